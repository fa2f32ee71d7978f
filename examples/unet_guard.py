"""A U-Net script without Ray, guarded: saved when memory gets short, resumed by running it again.

    python examples/unet_guard.py --out runs/unet
    python examples/unet_guard.py --out runs/unet --drill-at 12      # as if memory were short in step 12: exit code 75
    python examples/unet_guard.py --out runs/unet                    # goes on where it stopped, bit by bit

The lines that guard it are marked.
"""

import argparse
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from brainenc.guard import MemoryGuard  # <- guard


def block(inside: int, outside: int) -> nn.Sequential:
    """Two convolutions with normalisation."""
    layers = []
    for channels in (inside, outside):
        layers += [nn.Conv2d(channels, outside, 3, padding=1), nn.BatchNorm2d(outside), nn.ReLU()]
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """Two levels down, two up: (B, 1, H, W) -> (B, 1, H, W)."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = block(1, width), block(width, 2 * width), block(2 * width, 4 * width)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, stride=2)
        self.up1 = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.merge2, self.merge1, self.out = (
            block(4 * width, 2 * width),
            block(2 * width, width),
            nn.Conv2d(width, 1, 1),
        )
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Segment."""
        one = self.down1(x)
        two = self.down2(self.pool(one))
        bottom = self.drop(self.bottom(self.pool(two)))
        up = self.merge2(torch.cat([self.up2(bottom), two], 1))
        return self.out(self.merge1(torch.cat([self.up1(up), one], 1)))


def discs(n: int, size: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy images of a disc each, and where the disc is."""
    axis = torch.arange(size, dtype=torch.float32)
    centre, radius = torch.rand(n, 2) * size * 0.5 + size * 0.25, torch.rand(n) * size * 0.15 + 3
    distance = (axis[:, None] - centre[:, 0, None, None]) ** 2 + (axis - centre[:, 1, None, None]) ** 2
    masks = (distance < radius[:, None, None] ** 2).float().unsqueeze(1)
    return masks + 0.3 * torch.randn(n, 1, size, size), masks


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/unet"))
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--drill-at", type=int, default=-1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    images, masks = discs(80)
    loader = DataLoader(TensorDataset(images[:64], masks[:64]), batch_size=args.batch_size, shuffle=True)
    held_out = DataLoader(TensorDataset(images[64:], masks[64:]), batch_size=args.batch_size)
    model = UNet()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    count = 0
    with MemoryGuard(
        model=model, optimizer=optimizer, save_dir=args.out, batch_size=args.batch_size
    ) as guard:  # <- guard
        guard.resume()  # <- guard
        for epoch in guard.epochs(args.epochs):  # <- guard: instead of range
            model.train()
            for _step, (x, y) in guard.batches(loader):  # <- guard: instead of enumerate
                if count == args.drill_at:
                    guard.drill("ram", 0.95)
                count += 1
                loss = nn.functional.binary_cross_entropy_with_logits(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            model.eval()
            overlap = []
            for step, (x, y) in enumerate(held_out):
                guard.check(step, training=False)  # <- guard
                with torch.no_grad():
                    found = (model(x) > 0).float()
                overlap.append(float(2 * (found * y).sum() / (found.sum() + y.sum()).clamp(min=1)))
            print(f"epoch {epoch}: loss {loss.item():.4f}, Dice {sum(overlap) / len(overlap):.3f}", flush=True)
    torch.save(model.state_dict(), args.out / "final.pt")


if __name__ == "__main__":
    main()
