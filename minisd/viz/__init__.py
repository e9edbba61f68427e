"""All figures of the notebooks and commands: one figure, one call. They take tensors and trajectories, never a model.

    files       to_pil, sheet, save_sheet                       pictures as files, pixel by pixel
    pictures    strip, captioned                                pictures side by side, with titles, labels, captions
                noising_strip                                   pictures dissolve into noise, by one schedule or several
                trajectory                                      what a sampler did: x_t and its estimate of x_0
    plots       curves, schedule_curves                         numbers against t
                loss_by_timestep                                what a model gets wrong at each t, above the floor
                histograms                                      samples, against the Gaussian that they should follow
                with_errors                                     numbers with error bars, over settings or groups
                convergence, ruler                              samplers: error over cost; the timesteps they visit
    toys        density_over_time                               data on a line: q(x_t), and the paths through it
                clouds, vector_field                            data in the plane: points, and an arrow at each place
                walks, pursuit                                  paths to the data; steps beside their curve
    words       token_table, matrices                           sentences in pieces; what belongs to what, in shades
    layers      maps, plane                                     channels of a latent; a latent of two numbers as a map
                feature_maps, attention_maps                    channels of a layer; where the pixels look
    diagrams    unet_diagram                                    a UNet's blocks, and what is handed across
                training_diagram, sampling_diagram, class_diagram    the whole model as boxes

All but those of `files` return a matplotlib Figure. A notebook shows it if it stands in a cell's last line; a script
says `figure.savefig("figure.png")`. Pictures are [c h w] in [-1, 1], RGB or (c = 1) grey; what lies outside is clamped.
"""

from ..pictures import save_sheet, sheet, to_pil
from .diagrams import class_diagram, sampling_diagram, training_diagram, unet_diagram
from .layers import attention_maps, feature_maps, maps, plane
from .page import COLOURS, DASHES
from .pictures import captioned, noising_strip, strip, trajectory
from .plots import convergence, curves, histograms, loss_by_timestep, ruler, schedule_curves, with_errors
from .toys import clouds, density_over_time, pursuit, vector_field, walks
from .words import matrices, token_table

__all__ = [
    "COLOURS", "DASHES", "attention_maps", "captioned", "class_diagram", "clouds", "convergence", "curves",
    "density_over_time", "feature_maps", "histograms", "loss_by_timestep", "maps", "matrices", "noising_strip", "plane",
    "pursuit", "ruler", "sampling_diagram", "save_sheet", "schedule_curves", "sheet", "strip", "to_pil", "token_table",
    "training_diagram", "trajectory", "unet_diagram", "vector_field", "walks",
    "with_errors",
]  # fmt: skip
