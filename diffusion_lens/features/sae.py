"""TopK sparse autoencoder on bottleneck activations: encode, decode, edit by difference, save and load.

Terms are the field's: ``d_in, d_sae, k, W_enc, b_enc, W_dec, b_dec, hidden_pre, feature_acts, sae_out``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from diffusion_lens.base.types import FeatureActs, LensError
from diffusion_lens.features.sae_config import SAEConfig as SAEConfig
from diffusion_lens.features.sae_files import StoredSAE, read_sae, write_sae
from diffusion_lens.features.sae_identity import Origin, fold, identify

# Dense hidden_pre of one chunk: 2^24 floats are 64 MiB.
CHUNK_NUMBERS = 2**24


class SparseAutoencoder(nn.Module):
    """``s = TopK(ReLU((x − b_dec) W_enc + b_enc))``, ``x̂ = s W_dec + b_dec`` (DiffLens, paper eq; SAELens' TopK).

    Weights: ``W_enc [d_in, d_sae]``, ``b_enc [d_sae]``, ``W_dec [d_sae, d_in]``, ``b_dec [d_in]``; all zero until
    trained or loaded. Training scales x so that mean ``‖x‖² = d_in`` and folds that scale in (``fold_scale``): codes
    are in the units of training, x̂ and the decoder's rows in those of x.
    """

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_in, cfg.d_sae))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in))
        self.origin: Origin | None = None
        self._known_id: tuple[tuple[object, ...], str] | None = None

    @property
    def sae_id(self) -> str:
        """First 16 hex digits of a sha256 over configuration and weights (``sae_identity``); follows every change."""
        key: tuple[object, ...] = tuple(
            (p.data_ptr(), None if p.is_inference() else p._version) for p in self.parameters()
        )
        if self._known_id is None or self._known_id[0] != key:
            self._known_id = key, identify(self.cfg, dict(self.named_parameters()), self.origin)
        return self._known_id[1]

    def to_samples(self, h: Tensor) -> Tensor:
        """Maps ``[n, c, y, x]`` → samples ``[n·y·x, c]`` ("position") or ``[n, c·y·x]`` ("map").

        Raises ``LensError`` if the maps are not of this SAE's channels and, in the map layout, size.
        """
        wrong_map = self.cfg.layout == "map" and tuple(h.shape[2:]) != self.cfg.spatial
        if h.ndim != 4 or h.shape[1] != self.cfg.channels or wrong_map:
            want = f"[n, {self.cfg.channels}, {self.cfg.spatial[0]}, {self.cfg.spatial[1]}]"
            raise LensError(f"This SAE reads activations {want} of {self.cfg.hook_name}; it was given {list(h.shape)}.")
        if self.cfg.layout == "map":
            return h.flatten(1)
        return h.permute(0, 2, 3, 1).reshape(-1, h.shape[1])

    def from_samples(self, x: Tensor, spatial: tuple[int, int] | None = None) -> Tensor:
        """Samples back to maps ``[n, c, y, x]``; the inverse of ``to_samples`` (``spatial`` defaults to the SAE's)."""
        y, width = spatial or self.cfg.spatial
        if self.cfg.layout == "map":
            return x.reshape(-1, self.cfg.channels, y, width)
        return x.reshape(-1, y, width, self.cfg.d_in).permute(0, 3, 1, 2)

    def hidden_pre(self, x: Tensor) -> Tensor:
        """Samples ``[..., d_in]`` → pre-activations ``[..., d_sae]``."""
        x = x.to(self.W_enc.dtype)
        if self.cfg.apply_b_dec_to_input:
            x = x - self.b_dec
        return x @ self.W_enc + self.b_enc

    def encode_sparse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Samples ``[..., d_in]`` → ``values, indices [..., k]``: the k largest pre-activations, cut at 0.

        Where fewer than k are positive, the rest have value 0. Ties at the k-th place keep k features.
        """
        values, indices = self.hidden_pre(x).topk(self.cfg.k, dim=-1, sorted=False)
        return values.relu(), indices

    def encode(self, x: Tensor) -> Tensor:
        """Samples ``[..., d_in]`` → dense feature_acts ``[..., d_sae]``, at most k of them above 0."""
        values, indices = self.encode_sparse(x)
        return values.new_zeros(*values.shape[:-1], self.cfg.d_sae).scatter(-1, indices, values)

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Dense feature_acts ``[..., d_sae]`` → sae_out ``[..., d_in]``."""
        return feature_acts @ self.W_dec + self.b_dec

    def decode_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """``values, indices [samples, k]`` → sae_out ``[samples, d_in]``, without a dense code."""
        summed = nn.functional.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return summed + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """Samples ``[..., d_in]`` → sae_out ``[..., d_in]``."""
        return self.decode(self.encode(x))

    def feature_acts_of(self, h: Tensor, ids: Tensor) -> Tensor:
        """Activations of chosen features in maps ``h [n, c, y, x]`` → ``[n, samples per map, m]``, after the TopK."""
        values, indices = self.encode_sparse(self.to_samples(h))
        column = torch.full((self.cfg.d_sae,), len(ids), device=indices.device)
        column[ids] = torch.arange(len(ids), device=indices.device)
        chosen = values.new_zeros(len(values), len(ids) + 1).scatter_(1, column[indices], values)[:, :-1]
        return chosen.reshape(h.shape[0], -1, len(ids))

    def edit_delta(self, h: Tensor, ids: Sequence[int] | Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The change of ``h [n, c, y, x]`` when feature ``ids[j]`` goes from ``s_j`` to ``scale_j s_j + shift_j``.

        ``Δh = ((scale − 1) s_S + shift) W_dec[S]``: by difference, so SAE error and bias cancel, and
        exact zeros where ``scale`` is 1 and ``shift`` 0. ``scale, shift [n or 1, m]``; only the edited
        columns are decoded, and a pure shift needs no encoder.
        """
        ids = torch.as_tensor(ids, dtype=torch.long, device=self.W_dec.device)
        gain = scale - 1
        change = shift.to(self.W_dec).expand(h.shape[0], -1)[:, None]
        if bool(gain.any()):  # asked where it was made: a device would have to be waited for
            change = change + gain.to(self.W_dec)[:, None] * self.feature_acts_of(h.to(self.W_dec), ids)
        moved = change @ self.W_dec[ids]
        if self.cfg.layout == "map":
            return moved.reshape(h.shape).to(h)
        y, x = h.shape[2:]
        moved = moved.expand(-1, y * x, -1)
        return moved.reshape(-1, y, x, h.shape[1]).permute(0, 3, 1, 2).to(h)

    @torch.no_grad()
    def codes(self, h: np.ndarray | Tensor) -> FeatureActs:
        """Sparse codes of activations ``h [n, step, c, y, x]``, chunk by chunk: ``values, indices [n, step, y, x, k]``.

        In the map layout y = x = 1, for there is one code per map.
        """
        n, n_steps = h.shape[:2]
        y, x = h.shape[3:] if self.cfg.layout == "position" else (1, 1)
        values = np.empty((n, n_steps, y, x, self.cfg.k), np.float32)
        indices = np.empty((n, n_steps, y, x, self.cfg.k), np.int32)
        for step in range(n_steps):
            for rows in image_chunks(self, n, (y, x)):
                part = torch.as_tensor(h[rows, step]).to(self.W_enc)
                v, i = self.encode_sparse(self.to_samples(part))
                values[rows, step] = v.reshape(-1, y, x, self.cfg.k).cpu().numpy()
                indices[rows, step] = i.reshape(-1, y, x, self.cfg.k).cpu().numpy()
        return FeatureActs(values, indices, self.cfg.d_sae, self.sae_id)

    @torch.no_grad()
    def fold_scale(self, scale: float) -> None:
        """Become the SAE that does for x what this one does for ``scale · x``: the same codes, x̂ in x's units."""
        folded = fold(dict(self.named_parameters()), scale)
        for name, parameter in self.named_parameters():
            parameter.copy_(folded[name])

    def save(self, folder: Path | str) -> None:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` into ``folder``, as SAELens does (see ``sae_files``)."""
        write_sae(Path(folder), StoredSAE(self.cfg, dict(self.named_parameters()), self.origin))

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> SparseAutoencoder:
        """Read a folder written by ``save``, by version 0.4, or a TopK SAE by SAELens itself; frozen weights.

        Raises ``LensError`` that names a bad file, or another format or architecture.
        """
        stored = read_sae(Path(folder))
        sae = _fill(cls(stored.cfg), stored.weights, str(folder))
        sae.origin = stored.origin
        return sae.to(device)


def image_chunks(sae: SparseAutoencoder, n: int, grid: tuple[int, int] | None = None) -> Iterator[slice]:
    """Rows of ``n`` maps, of codes ``grid (y, x)`` (the SAE's own), in chunks near 64 MiB of pre-activations."""
    y, x = grid or sae.cfg.code_grid
    size = max(1, CHUNK_NUMBERS // (y * x * sae.cfg.d_sae))
    for start in range(0, n, size):
        yield slice(start, min(start + size, n))


def from_published(
    state: Mapping[str, Tensor], *, k: int, spatial: tuple[int, int], hook_name: str, model_id: str
) -> SparseAutoencoder:
    """An SAE in DiffLens' published form: ``encoder.weight, encoder.bias, decoder.weight, decoder.bias``.

    A 1×1 kernel gives the position layout; a kernel that covers the map (its decoder a transposed
    convolution) the map layout. The published encoder reads ``h`` itself, without the pre-bias.
    Raises ``LensError`` if a tensor is missing or the shapes fit neither form.
    """
    missing = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"} - set(state)
    if missing:
        raise LensError(f"The SAE checkpoint has no tensor named {', '.join(sorted(missing))}.")
    encoder, decoder = state["encoder.weight"], state["decoder.weight"]
    if encoder.ndim != 4 or decoder.ndim != 4 or tuple(encoder.shape[2:]) not in ((1, 1), tuple(spatial)):
        raise LensError(f"The SAE checkpoint's kernel {tuple(encoder.shape[2:])} is neither 1×1 nor the map {spatial}.")
    is_map = tuple(encoder.shape[2:]) != (1, 1)
    y, x = spatial
    bias = state["decoder.bias"]
    cfg = SAEConfig(
        d_in=encoder[0].numel(),
        d_sae=len(encoder),
        k=k,
        layout="map" if is_map else "position",
        hook_name=hook_name,
        model_id=model_id,
        spatial=spatial,
        apply_b_dec_to_input=False,
    )
    tensors = {
        "W_enc": encoder.flatten(1).T,
        "b_enc": state["encoder.bias"],
        "W_dec": decoder.flatten(1) if is_map else decoder[:, :, 0, 0].T,
        "b_dec": bias.repeat_interleave(y * x) if is_map else bias,
    }
    return _fill(SparseAutoencoder(cfg), tensors, "the SAE checkpoint")


def _fill(sae: SparseAutoencoder, tensors: Mapping[str, Tensor], where: str) -> SparseAutoencoder:
    """Copy named tensors into ``sae`` and freeze it; ``LensError`` names the first that does not fit."""
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name not in tensors or tensors[name].shape != parameter.shape:
                found = list(tensors[name].shape) if name in tensors else "nothing"
                raise LensError(f"{where}: {name} should be {list(parameter.shape)}; found {found}.")
            parameter.copy_(tensors[name])
    return sae.requires_grad_(False)
