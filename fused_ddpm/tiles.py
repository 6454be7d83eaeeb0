"""An image of any size cut into tiles of one size, which overlap by half, and put together again.

What is put together is what a network predicts, at each step of one reverse process for the whole
image (MultiDiffusion, Bar-Tal et al. 2023). Blending finished draws would narrow their spread.
"""

from fused_ddpm.folders import square, starts

import torch
import torch.nn.functional as F


class Tiles:
    """Tiles of an image: at, their (rows, columns); total += tile * window, / weight, blends them.

    An image less than a tile wide or high is padded. window: (side, side), smooth, largest in the
    middle. weight: (H, W), the sum of the windows; nearest: (H, W), the tile of the largest.
    """

    def __init__(self, wanted, side):
        """wanted: bool (H, W); tiles without any of these pixels are left out."""
        self.size = wanted.shape
        wanted = F.pad(wanted, self._padding(side))
        rows, columns = (starts(n, side, side // 2) for n in wanted.shape)
        places = [square(y, x, side) for y in rows for x in columns]
        self.at = [at for at in places if wanted[at].any()]
        bump = torch.sin((torch.arange(side) + 0.5) * torch.pi / side) ** 2
        self.window = (bump[:, None] * bump).to(wanted.device)
        self.weight = torch.zeros(wanted.shape, device=wanted.device)
        self.nearest, most = torch.zeros_like(wanted, dtype=torch.long), self.weight.clone()
        for i, at in enumerate(self.at):
            self.weight[at] += self.window
            self.nearest[at] = torch.where(self.window > most[at], i, self.nearest[at])
            most[at] = torch.maximum(most[at], self.window)
        self.weight.clamp_(min=1e-9)
        self.side = side

    def _padding(self, side):
        below, right = (max(side - n, 0) for n in self.size)
        return 0, right, 0, below

    def pad(self, x):
        """(..., H, W) with zeros below and at the right, up to a tile."""
        return F.pad(x, self._padding(self.side))

    def trim(self, x):
        """Without what pad adds."""
        return x[..., : self.size[0], : self.size[1]]
