"""Tools to inspect a model while it runs. The model itself does not import them.

    tracing           minisd.trace(sd, "a red fox"): everything that is computed between the prompt and the picture
    attention_maps    minisd.record_attention(sd): which words each pixel attends to, at each step and layer
    comparison        minisd.compare(ours, theirs, inputs): the first layer at which two networks differ
    unet_outline      outline(config): the blocks of a UNet as a table

The texts that a trace prints are in `tracing.toml`.
"""
