"""The lesson's loop: decode, crop and train, forty lines, torch's own defaults.

What bench.throughput compares with. `python -m bench.lesson_loop --model alexnet` trains with it.
"""

import argparse
from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from data.image_set import in_memory
from data.sources import load_source
from models import build_model


class Pictures(Dataset):
    """PIL pictures through torchvision's transforms, one by one."""

    def __init__(
        self, images: Tensor, labels: Tensor, transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self.images = images.permute(0, 2, 3, 1).numpy()
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def train(
    model_name: str, dataset: str, image_size: int, batch_size: int, epochs: int,
    num_workers: int = 2,
) -> None:  # fmt: skip
    source = load_source(dataset)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(image_size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(source.mean, source.std),
        ]
    )
    data = Pictures(in_memory(source.train).images, source.train.labels, transform)
    loader = DataLoader(data, batch_size=batch_size, shuffle=True, num_workers=num_workers)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(model_name, num_classes=len(source.classes), image_size=image_size)
    model = model.to(device)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    for epoch in range(epochs):
        running_loss = 0.0
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
        print(f"epoch {epoch + 1}: loss {running_loss / len(loader):.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__ and __doc__.splitlines()[0])
    parser.add_argument("--model", default="alexnet")
    parser.add_argument("--dataset", default="synthetic")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=1)
    arguments = parser.parse_args()
    train(*vars(arguments).values())
