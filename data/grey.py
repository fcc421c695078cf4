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


def of_three(numbers: Sequence[float]) -> tuple[float, float, float]:
    """What is said of one channel or of three, of three."""
    red, green, blue = tuple(numbers) * 3 if len(numbers) == 1 else numbers
    return red, green, blue
