"""One channel instead of three: the brightness of a colour."""

from collections.abc import Sequence

from torch import Tensor

# Of red, green and blue in 65,536 (ITU-R 601-2, as Pillow's L): whole numbers add up exactly, and
# a grey pixel stays what it is.
SHARES = (19595, 38470, 7471)


def grey(images: Tensor) -> Tensor:
    """The brightness of float images (n, 3, H, W) as (n, 1, H, W); of one channel, themselves."""
    if images.shape[1] == 1:
        return images
    red, green, blue = (images[:, place : place + 1] for place in range(3))
    return (red * SHARES[0] + green * SHARES[1] + blue * SHARES[2]) / 65536


def of_one(numbers: Sequence[float]) -> tuple[float]:
    """What is said of three colours, of their brightness: their mean."""
    return (numbers[0] if len(set(numbers)) == 1 else sum(numbers) / len(numbers),)


def mean_colour(mean: Sequence[float]) -> tuple[int, int, int]:
    """Red, green and blue in 0..255 of the mean in 0..1 of three channels or one."""
    red, green, blue = tuple(round(255 * value) for value in mean) * (3 // len(mean))
    return red, green, blue
