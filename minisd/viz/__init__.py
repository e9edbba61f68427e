"""All figures of the notebooks and commands, one function each. They take tensors and trajectories, never a model.

    files       to_pil, sheet, save_sheet                       pictures as image files, without resampling
    pictures    strip, captioned                                pictures side by side, with titles, labels, captions
                noising_strip                                   pictures with more and more noise, for some schedules
                trajectory                                      the steps of a sampler: x_t and its estimate of x_0
    plots       curves, schedule_curves                         numbers against t, and what is exact in black
                histograms                                      samples, and the Gaussian that they should follow
                with_errors                                     numbers with error bars, for settings or groups
                convergence, ruler                              samplers: error against cost; the timesteps they visit
    toys        density_over_time                               one-dimensional data: q(x_t), and paths through it
                clouds, vector_field                            two-dimensional data: points, and arrows
                walks                                           paths to the data
    words       token_table, matrices                           tokens of sentences; matrices as shades of colour
    layers      maps, plane                                     channels of a latent; a two-dimensional latent as a map
                feature_maps, attention_maps                    channels of a layer; which pixels attend to a token
    diagrams    unet_diagram                                    a UNet's blocks and skip connections
                training_diagram, sampling_diagram, class_diagram    the whole model as boxes: SVG files
                pipeline, diagram                       the whole with one stage lit; single ideas: SVG files

All except for those of `files` and the last five return a matplotlib Figure. A notebook shows it if it is the last
line of a cell. In a script, call `figure.savefig("figure.png")`. Pictures are [c h w] in [-1, 1], RGB or grey (c = 1);
other values are clamped.
"""

from ..pictures import save_sheet, sheet, to_pil
from .diagrams import class_diagram, diagram, pipeline, sampling_diagram, training_diagram, unet_diagram
from .layers import attention_maps, feature_maps, maps, plane
from .page import COLOURS, DASHES
from .pictures import captioned, noising_strip, strip, trajectory
from .plots import convergence, curves, histograms, ruler, schedule_curves, with_errors
from .toys import clouds, density_over_time, vector_field, walks
from .words import matrices, token_table
