"""CIFAR-10: what it is called, where copies of it are, and how to know one."""

from data.sources.published import Published

CIFAR10 = Published(
    title="CIFAR-10",
    hub="uoft-cs/cifar10",
    variable="CIFAR10_DIR",
    shape=(3, 32, 32),
    classes=(
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
)
