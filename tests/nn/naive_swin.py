"""VSC-Swin written a second time: one frame and one token at a time, from the definition and a state dict alone."""

import math
from typing import Any

import torch
from torch import Tensor

Frame = dict[tuple[int, int], Tensor]


class NaiveSwin:
    """Compute the feature of a frame from a state dict of VSCSwin; tokens live in a dictionary by (row, column)."""

    def __init__(
        self,
        state: dict[str, Tensor],
        *,
        grid: int,
        depths: tuple[int, ...],
        heads: tuple[int, ...],
        window: int,
        keep: dict[tuple[int, int], int] | None = None,
        compress: tuple[tuple[int, int], ...] = (),
        regrid: bool = False,
        **vsc: Any,
    ) -> None:
        self.state, self.grid, self.depths, self.heads, self.window = state, grid, depths, heads, window
        self.keep, self.compress, self.regrid, self.vsc = keep or {}, compress, regrid, vsc
        self.positions: list[list[tuple[int, int]]] = []

    def __call__(self, frame: Tensor, guide: Tensor | None) -> Tensor:
        s = self.state
        patch = s["patch_embed.proj.weight"].shape[-1]
        side, own, regridded = self.grid, self.grid, False
        tokens: Frame = {}
        for y in range(side):
            for x in range(side):
                piece = frame[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
                value = (s["patch_embed.proj.weight"] * piece).sum((1, 2, 3)) + s["patch_embed.proj.bias"]
                tokens[y, x] = self.norm("patch_embed.norm", value)
        for i, depth in enumerate(self.depths):
            if i:
                tokens = self.merge(f"layers.{i}.downsample", tokens)
                side, own = (side + 1) // 2, (own + 1) // 2
            reference = min(self.window, own)
            for j in range(depth):
                name = f"layers.{i}.blocks.{j}"
                window = reference
                if regridded:
                    window = side if side <= 8 else max(w for w in range(1, 9) if side % w == 0)
                shift = window // 2 if j % 2 and window < side else 0
                branch = self.attend(name, tokens, self.heads[i], window, shift, reference)
                tokens = {p: x + self.norm(f"{name}.norm1", branch[p]) for p, x in tokens.items()}
                if (i, j) in self.compress:
                    tokens = self.compressed(name, tokens, guide, self.keep.get((i, j)))
                    if self.regrid:
                        side, regridded = math.isqrt(len(tokens)), True
                        tokens = {(n // side, n % side): x for n, x in enumerate(tokens.values())}
                tokens = {p: x + self.norm(f"{name}.norm2", self.mlp(name, x)) for p, x in tokens.items()}
        return torch.stack([self.norm("norm", x) for x in tokens.values()]).mean(0)

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = self.state[f"{name}.weight"] @ x
        return y + self.state[f"{name}.bias"] if f"{name}.bias" in self.state else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        centred = x - x.mean()
        scaled = centred / (centred.square().mean() + 1e-5).sqrt()
        return scaled * self.state[f"{name}.weight"] + self.state[f"{name}.bias"]

    def mlp(self, name: str, x: Tensor) -> Tensor:
        hidden = self.linear(f"{name}.mlp.fc1", x)
        return self.linear(f"{name}.mlp.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))

    def bias(self, name: str, dy: int, dx: int, reference: int) -> Tensor:
        """The position bias of every head at one offset."""
        scaled = torch.tensor([dy, dx], dtype=torch.float32) / max(reference - 1, 1) * 8
        place = (scaled.sign() * torch.log2(scaled.abs() + 1) / math.log2(8)).to(self.state["norm.weight"])
        hidden = self.linear(f"{name}.attn.cpb_mlp.0", place).relu()
        return 16 * self.linear(f"{name}.attn.cpb_mlp.2", hidden).sigmoid()

    def attend(self, name: str, tokens: Frame, heads: int, window: int, shift: int, reference: int) -> Frame:
        s = self.state
        offsets = range(1 - window, window)
        biases = {(dy, dx): self.bias(name, dy, dx, reference) for dy in offsets for dx in offsets}
        qkv = {}
        for p, x in tokens.items():
            q, k, v = (s[f"{name}.attn.qkv.weight"] @ x).chunk(3)
            qkv[p] = q + s[f"{name}.attn.q_bias"], k, v + s[f"{name}.attn.v_bias"]
        scale = s[f"{name}.attn.logit_scale"].clamp(max=math.log(100)).exp().view(heads)
        out = {}
        for p, (q, _, _) in qkv.items():
            cell = ((p[0] - shift) // window, (p[1] - shift) // window)
            seen = [o for o in tokens if ((o[0] - shift) // window, (o[1] - shift) // window) == cell]
            keys = torch.stack([qkv[o][1].view(heads, -1) for o in seen])
            values = torch.stack([qkv[o][2].view(heads, -1) for o in seen])
            query = q.view(1, heads, -1)
            cosine = (query * keys).sum(2) / (query.norm(dim=2) * keys.norm(dim=2))
            logits = cosine * scale + torch.stack([biases[p[0] - o[0], p[1] - o[1]] for o in seen])
            out[p] = self.linear(f"{name}.attn.proj", (logits.softmax(0)[:, :, None] * values).sum(0).flatten())
        return out

    def compressed(self, name: str, tokens: Frame, guide: Tensor | None, keep: int | None) -> Frame:
        """The compression, one token after the other; the gate multiplies the normalised token."""
        assert guide is not None
        places, xs = list(tokens), list(tokens.values())
        weight = self.state[f"{name}.compress.vsc.guide_logit"].sigmoid()
        if f"{name}.compress.guide.weight" in self.state:
            guide = self.linear(f"{name}.compress.guide", guide)
        fused = weight * guide + (1 - weight) * torch.stack(xs).mean(0)
        score = [fused @ x / (fused.norm() * x.norm()) for x in xs]
        plain = torch.stack(score).detach()
        standard = (plain - plain.mean()) / plain.std(correction=0).clamp(min=1e-3)
        relevance = len(xs) * standard.softmax(0)
        if keep is not None:
            relevant = sorted(sorted(range(len(xs)), key=lambda n: (-relevance[n].item(), n))[:keep])
        else:
            relevant = [n for n in range(len(xs)) if relevance[n] >= self.vsc.get("threshold", 0.3)]
        merged: dict[int, list[tuple[Tensor, Tensor]]] = {n: [] for n in relevant}
        for i in range(len(xs)):
            if i not in merged:
                cosines = [xs[i] @ xs[j] / (xs[i].norm() * xs[j].norm()) for j in relevant]
                best = int(torch.stack(cosines).argmax())
                if cosines[best] >= self.vsc.get("fuse_threshold", 0.6):
                    merged[relevant[best]].append((cosines[best].exp(), xs[i]))
        out: Frame = {}
        self.positions.append([places[n] for n in relevant])
        for n in relevant:
            y = xs[n]
            if merged[n]:
                total = sum(w for w, _ in merged[n])
                y = 0.9 * y + 0.1 * sum(w * x for w, x in merged[n]) / total
            gate = 1 + score[n] - score[n].detach()
            out[places[n]] = gate * self.norm(f"{name}.compress.norm", y)
        return out

    def merge(self, name: str, tokens: Frame) -> Frame:
        channels = self.state[f"{name}.reduction.weight"].shape[1] // 4
        out = {}
        for cell in sorted({(y // 2, x // 2) for y, x in tokens}):
            corners = [(2 * cell[0] + y, 2 * cell[1] + x) for x in (0, 1) for y in (0, 1)]
            zero = self.state["norm.weight"].new_zeros(channels)
            joined = torch.cat([tokens.get(corner, zero) for corner in corners])
            out[cell] = self.norm(f"{name}.norm", self.linear(f"{name}.reduction", joined))
        return out
