"""The cross-modal contrastive loss in plain PyTorch: the oracle of every kernel."""

import torch
from torch import Tensor

NORM_FLOOR = 1e-12


def cross_modal_contrastive(
    a: Tensor,
    b: Tensor,
    labels: Tensor,
    labels_b: Tensor,
    row_offset: int,
    valid: Tensor,
    valid_b: Tensor,
    temperature: float,
    include_matched: bool,
    per_positive: bool,
) -> Tensor:
    """Compute :func:`deepmsi.ops.cross_modal_contrastive` with its arguments already checked.

    Args:
        a: Rows of the one modality [B, D], a slice of the joined batch of J rows.
        b: The joined rows of P other modalities [P, J, D].
        labels: Of a's rows [B].
        labels_b: Of the joined rows [J].
        row_offset: The joined row that a starts at.
        valid: Whether a row of a takes part in each pair [P, B] bool.
        valid_b: Whether a joined row takes part in each pair [P, J] bool.
        temperature: τ_c.
        include_matched: Whether (i, i) is a positive.
        per_positive: Whether to divide by |P(i)| rather than by J - 1.

    Returns:
        The slice's part of the mean over P of the loss, a scalar.
    """
    wide = torch.float64 if a.dtype == torch.float64 else torch.float32
    a, b = a.to(wide), b.to(wide)
    # What an absent row holds is arbitrary, even NaN: it must not reach a product.
    b = torch.where(valid_b[..., None], b, 0)
    a = torch.where(valid[..., None], a, 0)
    a = torch.nn.functional.normalize(a, dim=-1, eps=NORM_FLOOR)
    b = torch.nn.functional.normalize(b, dim=-1, eps=NORM_FLOOR)
    score = a @ b.transpose(1, 2) / temperature

    both = valid[:, :, None] & valid_b[:, None, :]
    same = labels[:, None] == labels_b[None, :]
    positive = both & same
    negative = both & ~same
    if not include_matched:
        row = torch.arange(row_offset, row_offset + a.shape[1], device=a.device)
        positive = positive & (row[:, None] != torch.arange(b.shape[1], device=a.device))

    # -log(e^s / (e^s + Z)) = softplus(log Z - s), by logsigmoid: exact at any size of its argument. A row without
    # negatives has log Z = -inf and a term of 0; its sum runs over a zero instead, so that no gradient is NaN.
    opposed = negative.any(2, keepdim=True)
    log_z = torch.where(opposed, score.masked_fill(~negative, -torch.inf), 0).logsumexp(2, keepdim=True)
    term = -torch.nn.functional.logsigmoid(score - log_z)
    total = torch.where(positive & opposed, term, 0).sum(2)

    count = valid_b.sum(1, keepdim=True).to(wide)
    other = positive.sum(2).to(wide) if per_positive else count - 1
    share = count * other
    return torch.where(count > 1, total / share.clamp(min=1), 0).sum() / b.shape[0]
