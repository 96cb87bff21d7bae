"""TopK sparse autoencoder on bottleneck activations: encode, decode, edit by difference, save and load.

Terms are the field's: ``d_in, d_sae, k, W_enc, b_enc, W_dec, b_dec, hidden_pre, feature_acts, sae_out``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_lens.base.config import StrictConfig
from diffusion_lens.base.types import FeatureActs, LensError

CONFIG_FILE = "cfg.json"
WEIGHTS_FILE = "sae_weights.safetensors"
# Dense hidden_pre of one chunk: 2^24 floats are 64 MiB.
CHUNK_NUMBERS = 2**24


class SAEConfig(StrictConfig):
    """What an SAE reads and how.

    Attributes:
        d_in: numbers in one sample: channels ("position") or channels · y · x ("map").
        d_sae: dictionary size. k: features kept per sample.
        layout: "position" makes every position of the map a sample (1×1 kernel), "map" the whole map one.
        hook_name, model_id: the module and the model the activations come from.
        spatial: ``(y, x)`` of the map.
        normalise: one factor the input is multiplied by, so that mean ‖x‖² = d_in; feature_acts are in these units.
        apply_b_dec_to_input: subtract ``b_dec`` before encoding (paper eq; the published weights do not).
    """

    d_in: int = Field(gt=0)
    d_sae: int = Field(gt=0)
    k: int = Field(gt=0)
    layout: Literal["position", "map"]
    hook_name: str
    model_id: str
    spatial: tuple[int, int]
    normalise: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    apply_b_dec_to_input: bool = True

    @model_validator(mode="after")
    def _consistent(self) -> SAEConfig:
        if self.k > self.d_sae:
            raise ValueError("k must not exceed d_sae")
        if min(self.spatial) < 1:
            raise ValueError("spatial must be two positive numbers")
        if self.layout == "map" and self.d_in % (self.spatial[0] * self.spatial[1]):
            raise ValueError("d_in must be a multiple of y * x in the map layout")
        return self

    @property
    def channels(self) -> int:
        """Channels of the activation map that is read."""
        return self.d_in if self.layout == "position" else self.d_in // (self.spatial[0] * self.spatial[1])

    @property
    def code_grid(self) -> tuple[int, int]:
        """``(y, x)`` of the codes: the map itself, or ``(1, 1)`` where one code stands for the whole map."""
        return self.spatial if self.layout == "position" else (1, 1)


class SparseAutoencoder(nn.Module):
    """``s = TopK(ReLU((c x − b_dec) W_enc + b_enc))``, ``x̂ = (s W_dec + b_dec) / c`` (DiffLens, paper eq).

    ``c`` is ``cfg.normalise``, a working form of ours. Weights: ``W_enc [d_in, d_sae]``, ``b_enc [d_sae]``,
    ``W_dec [d_sae, d_in]``, ``b_dec [d_in]``; all zero until trained or loaded.
    """

    def __init__(self, cfg: SAEConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.W_enc = nn.Parameter(torch.zeros(cfg.d_in, cfg.d_sae))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae))
        self.W_dec = nn.Parameter(torch.zeros(cfg.d_sae, cfg.d_in))
        self.b_dec = nn.Parameter(torch.zeros(cfg.d_in))
        self._known_id: tuple[tuple[object, ...], str] | None = None

    @property
    def sae_id(self) -> str:
        """First 16 hex digits of a sha256 over configuration and weights; follows every change of them."""
        key: tuple[object, ...] = tuple(
            (p.data_ptr(), None if p.is_inference() else p._version) for p in self.parameters()
        )
        if self._known_id is None or self._known_id[0] != key:
            self._known_id = key, _fingerprint(self)
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
        if self.cfg.normalise != 1.0:
            x = x * self.cfg.normalise
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
        return (feature_acts @ self.W_dec + self.b_dec) / self.cfg.normalise

    def decode_sparse(self, values: Tensor, indices: Tensor) -> Tensor:
        """``values, indices [samples, k]`` → sae_out ``[samples, d_in]``, without a dense code."""
        summed = nn.functional.embedding_bag(indices, self.W_dec, per_sample_weights=values, mode="sum")
        return (summed + self.b_dec) / self.cfg.normalise

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

        ``Δh = ((scale − 1) s_S + shift) W_dec[S] / c``: by difference, so SAE error and bias cancel, and
        exact zeros where ``scale`` is 1 and ``shift`` 0. ``scale, shift [n or 1, m]``; only the edited
        columns are decoded, and a pure shift needs no encoder.
        """
        ids = torch.as_tensor(ids, dtype=torch.long, device=self.W_dec.device)
        gain = (scale - 1).to(self.W_dec)
        change = shift.to(self.W_dec).expand(h.shape[0], -1)[:, None]
        if bool(gain.any()):
            change = change + gain[:, None] * self.feature_acts_of(h.to(self.W_dec), ids)
        moved = change @ (self.W_dec[ids] / self.cfg.normalise)
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
        grid = self.cfg.code_grid
        values = np.empty((n, n_steps, *grid, self.cfg.k), np.float32)
        indices = np.empty((n, n_steps, *grid, self.cfg.k), np.int32)
        for step in range(n_steps):
            for rows in image_chunks(self, n):
                part = torch.as_tensor(h[rows, step]).to(self.W_enc)
                v, i = self.encode_sparse(self.to_samples(part))
                values[rows, step] = v.reshape(-1, *grid, self.cfg.k).cpu().numpy()
                indices[rows, step] = i.reshape(-1, *grid, self.cfg.k).cpu().numpy()
        return FeatureActs(values, indices, self.cfg.d_sae, self.sae_id)

    def save(self, folder: Path | str) -> None:
        """Write ``cfg.json`` and ``sae_weights.safetensors`` into ``folder``."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self.cfg.save(folder / CONFIG_FILE)
        tensors = {name: p.detach().cpu().contiguous() for name, p in self.named_parameters()}
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"sae_id": self.sae_id})

    @classmethod
    def load(cls, folder: Path | str, *, device: torch.device | str = "cpu") -> SparseAutoencoder:
        """Read a folder written by ``save``; frozen weights. Raises ``LensError`` that names a bad file."""
        folder = Path(folder)
        sae = cls(SAEConfig.load(folder / CONFIG_FILE))
        path = folder / WEIGHTS_FILE
        if not path.is_file():
            raise LensError(f"{WEIGHTS_FILE} is missing from {folder}.")
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
                written_id = (file.metadata() or {}).get("sae_id")
        except SafetensorError:
            raise LensError(f"{path} is damaged; restore it from the original.") from None
        _fill(sae, tensors, str(path))
        if written_id not in (None, sae.sae_id):
            raise LensError(f"{path} does not belong to the {CONFIG_FILE} beside it; restore both from the original.")
        return sae.to(device)


def image_chunks(sae: SparseAutoencoder, n: int) -> Iterator[slice]:
    """Rows of ``n`` maps in chunks whose dense pre-activations stay near 64 MiB."""
    per_map = sae.cfg.code_grid[0] * sae.cfg.code_grid[1] * sae.cfg.d_sae
    size = max(1, CHUNK_NUMBERS // per_map)
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


def _fingerprint(sae: SparseAutoencoder) -> str:
    digest = hashlib.sha256(json.dumps(sae.cfg.model_dump(mode="json"), sort_keys=True).encode())
    for name, parameter in sorted(sae.named_parameters()):
        digest.update(name.encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]
