"""The post's training code, rewritten in plain PyTorch from its description: the common peer.

Its numbers are those of the blog preset (configs/blog.toml), which cites the post and its code. It
is neither tuned nor slowed down.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Blur:
    """Pillow's Gaussian blur with a random radius of 0.1 to 2 pixels."""

    def __call__(self, image: Any) -> Any:
        from PIL import ImageFilter

        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def transform(size: int) -> Any:
    """Return the post's Appendix B as a torchvision transform of one PIL image."""
    from torchvision import transforms as T

    return T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0)),
            T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            T.RandomGrayscale(p=0.2),
            T.RandomApply([Blur()], p=0.5),
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize(MEAN, STD),
        ]
    )


class PairedViews(Dataset[tuple[Tensor, Tensor]]):
    """A dataset of two views of each image of a uint8 array (N, H, W, 3), made from PIL images."""

    def __init__(self, images: np.ndarray, size: int) -> None:
        self.images, self.transform = images, transform(size)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        from PIL import Image

        image = Image.fromarray(self.images[index])
        return self.transform(image), self.transform(image)


def loader(
    images: np.ndarray, *, size: int, batch_size: int, workers: int
) -> DataLoader[tuple[Tensor, Tensor]]:
    """Return a DataLoader of shuffled full batches of two views, (B, 3, S, S) each."""
    return DataLoader(
        PairedViews(images, size), batch_size, shuffle=True, drop_last=True, num_workers=workers
    )


def mlp(features: int, hidden: int, out: int, norm: bool) -> nn.Sequential:
    """Return the post's head: linear, optional norm, ReLU, linear."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.BatchNorm1d(hidden) if norm else nn.Identity(),
        nn.ReLU(),
        nn.Linear(hidden, out),
    )


class Lars:
    """LARS as a loop over parameters that reads both norms of each to the host.

    The rate is lr eta |w| / (|g| + wd |w|), or 0 if |w| is 0.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        eta: float,
    ) -> None:
        self.parameters = list(parameters)
        self.buffers = [torch.zeros_like(p) for p in self.parameters]
        self.lr, self.momentum, self.weight_decay, self.eta = lr, momentum, weight_decay, eta

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Update the parameters in place."""
        for p, buffer in zip(self.parameters, self.buffers, strict=True):
            assert p.grad is not None
            weight_norm, grad_norm = torch.norm(p).item(), torch.norm(p.grad).item()
            scale = grad_norm + self.weight_decay * weight_norm
            rate = self.lr * self.eta * weight_norm / scale if scale > 0 else 0.0
            buffer.mul_(self.momentum).add_(p.grad + self.weight_decay * p, alpha=rate)
            p.sub_(buffer)


@dataclass
class BlogPath:
    """The networks, optimizer and step of the post's code, in fp32 and torch's own layout."""

    online: nn.Module
    predictor: nn.Module
    target: nn.Module
    optimizer: Any
    tau: float = 0.996

    @staticmethod
    def create(
        *, optimizer: str = "sgd", mlp_norm: bool = True, device: str | torch.device = "cpu"
    ) -> BlogPath:
        """Build a ResNet-18 with heads 512-512-128 and 128-512-128.

        ``optimizer`` is sgd (lr 0.8, wd 1e-4) or lars (lr 0.2, wd 1.5e-6).
        """
        from torchvision.models import resnet18

        online = resnet18()
        online.fc = mlp(512, 512, 128, mlp_norm)  # the post, too, replaces fc by the projector
        predictor = mlp(128, 512, 128, mlp_norm)
        online.to(device)
        predictor.to(device)
        parameters = [*online.parameters(), *predictor.parameters()]
        made: Any
        if optimizer == "lars":
            made = Lars(parameters, lr=0.2, momentum=0.9, weight_decay=1.5e-6, eta=1e-3)
        else:
            made = torch.optim.SGD(
                parameters, lr=0.8, momentum=0.9, weight_decay=1e-4, foreach=False
            )
        return BlogPath(online, predictor, copy.deepcopy(online), made)

    def step(self, view: Tensor, other: Tensor) -> float:
        """Train on two views (B, 3, S, S), a pass per view, and return the loss.

        The target moves before the optimizer's step. The loss is read to the host, as by the post's
        logger.
        """
        q, q_other = self.predictor(self.online(view)), self.predictor(self.online(other))
        with torch.no_grad():
            z, z_other = self.target(view), self.target(other)
        loss = distance(q, z_other) + distance(q_other, z)
        self.follow()
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        self.optimizer.step()
        return float(loss.item())

    @torch.no_grad()
    def follow(self) -> None:
        """Move the target towards the online network, parameter by parameter."""
        for mine, theirs in zip(self.target.parameters(), self.online.parameters(), strict=True):
            mine.data = mine.data * self.tau + theirs.data * (1.0 - self.tau)

    @torch.no_grad()
    def embed(self, batches: Iterable[Tensor]) -> np.ndarray:
        """Return the embeddings y (N, 512) of normalised images in eval mode."""
        head, self.online.fc = self.online.fc, nn.Identity()
        self.online.eval()
        features = np.concatenate([self.online(batch).cpu().numpy() for batch in batches])
        self.online.train()
        self.online.fc = head
        return features


def distance(q: Tensor, z: Tensor) -> Tensor:
    """Return 1 - cos(q, z), averaged over the batch."""
    return 1.0 - F.cosine_similarity(q, z).mean()


def plain(images: np.ndarray, batch_size: int = 256) -> Iterator[Tensor]:
    """Yield uint8 images (N, H, W, 3) as normalised batches (B, 3, H, W), uncropped."""
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    for start in range(0, len(images), batch_size):
        yield (
            torch.from_numpy(images[start : start + batch_size]).permute(0, 3, 1, 2).float() / 255.0
            - mean
        ) / std


def probe(features: np.ndarray, labels: np.ndarray) -> float:
    """Fit a logistic regression to the first half and return the accuracy on the second in percent.

    The regression is scikit-learn's: one-vs-rest, liblinear, C = 1.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.multiclass import OneVsRestClassifier

    half = len(features) // 2
    model = OneVsRestClassifier(LogisticRegression(solver="liblinear", C=1.0, max_iter=100))
    model.fit(features[:half], labels[:half])
    return float(model.score(features[half:], labels[half:])) * 100.0
