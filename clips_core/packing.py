"""Several short texts in one row, so that a text encoder that masks pads need not compute them."""

import numpy as np
import torch
from torch import Tensor


def pack(lengths: np.ndarray, capacity: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Where each of the texts goes when rows of `capacity` tokens are filled, longest first, each into the fullest row it fits.

    Args:
        lengths: tokens of each text, int64 [B], from 1 to `capacity`.

    Returns:
        the row and the first place of each text, int64 [B] each, and the number of rows.
    """
    row, start = np.empty(len(lengths), np.int64), np.empty(len(lengths), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the places that are left
    rows = 0
    for text in np.argsort(-lengths, kind="stable"):
        length = int(lengths[text])
        room = next((room for room in range(length, capacity + 1) if open_rows[room]), None)
        if room is None:
            room, number, rows = capacity, rows, rows + 1
        else:
            number = open_rows[room].pop()
        row[text], start[text] = number, capacity - room
        open_rows[room - length].append(number)
    return row, start, rows


class Packing:
    """The texts `ids` [B, T], real tokens first and pads after, laid into R ≤ B rows of T places.

    Attributes:
        real: which of `ids` are no pads, bool [B, T].
        last: index of each text's last real token in the flattened rows, int64 [B].
        mask: what each place of a row may attend to, bool [R, T, T]: its own text; a place that stays empty, the empty ones.
    """

    def __init__(self, real: Tensor):
        batch, length = real.shape
        counts = real.sum(dim=1).cpu().numpy()
        row, start, self.rows = pack(counts, length)
        first = torch.from_numpy(row * length + start).to(real.device)  # [B]: of each text, in the flattened rows
        self.real = real
        self.places = (first[:, None] + torch.arange(length, device=real.device))[real]  # of each real token
        self.last = first + torch.from_numpy(counts).to(real.device) - 1
        owner = torch.zeros(self.rows * length, dtype=torch.int64, device=real.device)
        owner[self.places] = torch.arange(1, batch + 1, device=real.device)[:, None].expand(batch, length)[real]
        owner = owner.view(self.rows, length)
        self.mask = owner[:, :, None] == owner[:, None, :]

    def lay(self, tokens: Tensor) -> Tensor:
        """Tokens [B, T, D] → rows [R, T, D], zeros where nothing is."""
        length, width = tokens.shape[1:]
        rows = tokens.new_zeros(self.rows * length, width)
        return rows.index_put((self.places,), tokens[self.real]).view(self.rows, length, width)

    def take(self, rows: Tensor) -> Tensor:
        """Rows [R, T, D] → tokens [B, T, D], zeros at the pads."""
        tokens = rows.new_zeros(*self.real.shape, rows.shape[-1])
        tokens[self.real] = rows.flatten(0, 1)[self.places]
        return tokens
