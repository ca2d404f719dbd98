"""Features as nodes of a graph: latents of autoencoders and transcoders, and neurons.

`spliced(model, autoencoders, latents)` gives a model for `patchable_model`.
"""

from auto_circuit.model_utils.features.active import active_latents
from auto_circuit.model_utils.features.autoencoder import Autoencoder
from auto_circuit.model_utils.features.autoencoder_files import (
    load_autoencoder_folder,
    load_autoencoders,
    save_autoencoder,
)
from auto_circuit.model_utils.features.places import Neurons, Placed
from auto_circuit.model_utils.features.spliced import SplicedTransformer, spliced

__all__ = [
    "Autoencoder",
    "Neurons",
    "Placed",
    "SplicedTransformer",
    "active_latents",
    "load_autoencoder_folder",
    "load_autoencoders",
    "save_autoencoder",
    "spliced",
]
