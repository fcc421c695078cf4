"""A data set known by its name, of which anyone may have a copy: what tells that it is the one."""

from dataclasses import dataclass, replace

from common.errors import UserError
from common.text import places, printable
from data.image_set import Decoded
from data.scan import Scanned


@dataclass(frozen=True)
class Published:
    """What is known of it before a copy is read. Its pictures share one small size."""

    title: str
    hub: str  # its name on the Hugging Face hub
    variable: str  # of the environment, which may name a copy
    shape: tuple[int, int, int]
    classes: tuple[str, ...]

    def recognised(self, found: Decoded | Scanned, where: str) -> Decoded:
        """The same pictures, with the names of the classes; UserError where they are others."""
        if isinstance(found, Scanned):
            classes, images = found.records.classes, "photographs"
        else:
            classes, images = found.classes, f"images of {tuple(found.images.shape[1:])}"
        same_shape = isinstance(found, Decoded) and tuple(found.images.shape[1:]) == self.shape
        if not isinstance(found, Decoded) or not same_shape or len(classes) > len(self.classes):
            raise UserError(
                f"what lies at {printable(where)} is not {self.title}: {len(classes)} "
                f"classes, {images}; type --dataset {printable(where)} to train on it.",
                code="other-data-set",
            )
        numbers = tuple(map(str, range(len(found.classes))))
        if found.classes == numbers:  # a table need not name its classes
            return replace(found, classes=self.classes)
        there = places(found.classes, self.classes)
        in_range = all(0 <= label < len(there) for label in found.labels)  # else told later
        if None in there or not in_range:
            return found
        labels = [there[label] for label in found.labels]
        return replace(found, labels=labels, classes=self.classes)
