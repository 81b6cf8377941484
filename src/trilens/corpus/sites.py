"""The sites of a store: named, found in the model, their shapes measured on a few tokens."""

from __future__ import annotations

from trilens.axes import SITES, site_name
from trilens.corpus.coding import stored_dtype
from trilens.corpus.manifest import StoredSite
from trilens.corpus.options import StoreOptions
from trilens.errors import UsageError
from trilens.lens.lens import Lens
from trilens.lens.parts import ModelInfo
from trilens.models.tokens import vocab_size_of

__all__ = ["TOKEN_AXIS", "axes_of", "stored_sites"]

TOKEN_AXIS = "token"
_N_PROBE = 3


def axes_of(name: str) -> tuple[str, ...]:
    """The named axes of a site's values in a store: tokens first.

    Raises:
        UsageError: its first axis is not the tokens, so that it has no value for one.
    """
    axes = [axis.strip() for axis in SITES[name].axes.strip("[]").split(",")]
    if axes[0] != "seq":
        raise UsageError(
            f"site {name!r} has axes {SITES[name].axes}, not one value a token: a store holds "
            "sites whose first axis is the tokens; reduce=['attention'] keeps statistics of heads"
        )
    return (TOKEN_AXIS, *axes[1:])


def stored_sites(lens: Lens, options: StoreOptions) -> tuple[ModelInfo, tuple[StoredSite, ...]]:
    """What a model is, and the sites that a store of these options holds.

    Raises:
        UnknownSiteError: a name that no site has.
        SiteError, OutOfRangeError: a site or layer that the model has not.
        UsageError: a site without a value for each token, or one that is named twice; a decoder
            that answers a source.
    """
    lens.check_reads_texts()
    names = [site_name(text)[0] for text in options.sites]
    for name in names:
        if name not in SITES:
            raise UsageError(
                f"{name!r} is a gate, whose openness is reduced: give reduce=['gating']; its "
                "pre-activation may be a site"
            )
        axes_of(name)
    vocab = vocab_size_of(lens.model)
    ids = [(7 * place + 11) % vocab for place in range(_N_PROBE)]
    # Everything that will be asked is asked here once: what the model has not is refused now.
    found = lens.capture(
        ids,
        residual=None,
        logits=None,
        sites=options.sites,
        layers=options.layers,
        gates="gating" in options.reduce,
        attention="attention" in options.reduce,
    )
    sites = []
    for name, layer in found.sites if names else ():
        value = found.sites[name, layer]
        axes, shape = list(axes_of(name)), tuple(value.shape[1:])
        if len(shape) == len(axes):  # several residual streams are an axis of their own
            axes.insert(1, "streams")
        dtype = stored_dtype(options.dtype, value.dtype)
        words = str(dtype).removeprefix("torch.")
        sites.append(StoredSite(name, layer, tuple(axes), shape, words))
    return found.model, tuple(sites)
