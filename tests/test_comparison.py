"""Comparing networks: every seeded fault is found at its layer, and other people's networks are paired with ours."""

import copy
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from minisd.attention import GEGLU, BasicTransformerBlock, SpatialTransformer
from minisd.clip import CLIPTextConfig, CLIPTextModel
from minisd.instruments.comparison import compare
from minisd.unet import ResBlock, UNetConfig, UNetModel, timestep_embedding
from minisd.vae import AutoencoderConfig, AutoencoderKL

CONFIG = UNetConfig(
    model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(2, 1), num_heads=None,
    num_head_channels=16, context_dim=24,
)  # fmt: skip
MIDDLE = "middle_block.1.transformer_blocks.0"


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


INPUTS = draw(1, 2, 4, 8, 8), torch.tensor([3, 870]), draw(2, 2, 7, 24)


@pytest.fixture(scope="module")
def unet(randomise):
    return randomise(UNetModel(CONFIG))


@pytest.fixture
def theirs(unet):
    """The same network again, to put a fault into."""
    return copy.deepcopy(unet)


def hooks(network) -> int:
    return sum(len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in network.modules())


# -- equal networks ------------------------------------------------------------------------------------------------


def test_a_network_agrees_with_its_copy(unet, theirs):
    found = compare(unet, theirs, INPUTS)
    assert found.equal and found.first is None and found.hints == [] and found.check() is found
    assert {row.verdict for row in found.rows} == {"agree"} and all(row.ours == row.theirs for row in found.rows)
    leaves = [name for name, layer in unet.named_modules() if list(layer.parameters(recurse=False))]
    assert {row.ours for row in found.rows} == {*leaves, "output"}
    assert f"The outputs and all {len(leaves)} pairs of layers agree exactly." in str(found)
    assert "..." in str(found) and "..." not in found.report(every=True)


# -- seeded faults: (what is done to theirs) -> the layer where it shows, and what is said about it ----------------


def transformer(unet):
    return unet.middle_block[1].transformer_blocks[0]


class GateFirst(GEGLU):
    def forward(self, x):
        gate, x = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class Tanh(GEGLU):
    def forward(self, x):
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate, approximate="tanh")


class NoResidual(BasicTransformerBlock):
    def forward(self, x, context=None):
        x = x + self.attn1(self.norm1(x))
        x = self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class Folded(SpatialTransformer):
    """Folds the tokens back into columns where they came from rows."""

    def forward(self, x, context=None):
        tokens = self.proj_in(self.norm(x)).flatten(2).mT
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.mT.unflatten(2, x.shape[-2:]).mT)


class Refolded(SpatialTransformer):
    """Gives the tokens [b hw c] the shape [b c h w] by a reshape alone."""

    def forward(self, x, context=None):
        tokens = self.proj_in(self.norm(x)).flatten(2).mT
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.reshape(x.shape))


class NoTime(ResBlock):
    def forward(self, x, emb):
        self.emb_layers(emb)
        return self.skip_connection(x) + self.out_layers(self.in_layers(x))


class Reordered(UNetModel):
    """A forward pass of one's own, with one thing done in another way."""

    sines_first = skip_first = queue = False
    scale = 1.0

    def forward(self, x, timesteps, context):
        emb = timestep_embedding(timesteps, self.config.model_channels)
        emb = self.time_embed(emb.roll(emb.shape[1] // 2, 1) if self.sines_first else emb)
        h, skips = x, []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        if self.queue:
            skips[:2] = reversed(skips[:2])
        for block in self.output_blocks:
            both = [h, skips.pop()]
            h = block(torch.cat(both[::-1] if self.skip_first else both, dim=1), emb, context)
        return self.scale * self.out(h)


def put(*names, **values):
    """The fault that gives the module of this name other attributes (`__class__` is one)."""

    def fault(unet):
        for name in names:
            for key, value in values.items():
                setattr(unet.get_submodule(name), key, value)

    return fault


@torch.no_grad()
def one_row(unet):
    transformer(unet).attn2.to_k.weight[3] += 0.1


@torch.no_grad()
def transposed(unet):
    proj_out = unet.middle_block[1].proj_out
    proj_out.weight.copy_(proj_out.weight.transpose(0, 1).clone())


@torch.no_grad()
def halves(unet):
    proj = transformer(unet).ff.net[0].proj
    proj.weight.copy_(proj.weight.roll(len(proj.weight) // 2, 0))
    proj.bias.copy_(proj.bias.roll(len(proj.bias) // 2, 0))


@torch.no_grad()
def scaled(unet):
    unet.out[2].weight.mul_(-0.5)


@torch.no_grad()
def broken(unet):
    unet.out[2].bias[0] = torch.nan


FAULTS = {
    # in a layer
    "one row of a weight": (one_row, f"{MIDDLE}.attn2.to_k", True, "weight differs .*only number 3 of the 64 along"),
    "a transposed weight": (transposed, "middle_block.1.proj_out", True, "weight .*dimensions 0 and 1 are swapped"),
    "the halves of a weight": (halves, f"{MIDDLE}.ff.net.0.proj", True, "weight .*halves of dimension 0 are swapped"),
    "a scaled weight": (scaled, "out.2", True, "weight .*ours is -2 times theirs"),
    "NaN": (broken, "out.2", True, "theirs gives NaN"),
    "eps": (put("output_blocks.0.0.in_layers.0", eps=1e-2), "output_blocks.0.0.in_layers.0", True,
            "eps is 1e-05 in ours and 0.01 in theirs"),
    "num_groups": (put("out.0", num_groups=16), "out.0", True, "num_groups is 32 in ours and 16 in theirs"),
    "no bias": (put("out.2", bias=None), "out.2", True, "only ours has a bias"),
    # between the layers
    "a missing SiLU": (lambda unet: unet.middle_block[0].out_layers.__setitem__(1, nn.Identity()),
                       "middle_block.0.out_layers.3", False,
                       r"ours: SiLU\((.+out_layers.0)\); in theirs: \1 itself"),
    "another activation": (lambda unet: unet.time_embed.__setitem__(1, nn.GELU()), "time_embed.2", False,
                           r"ours: SiLU\(time_embed.0\); in theirs: GELU\(time_embed.0\)"),
    "GEGLU, gate first": (put(f"{MIDDLE}.ff.net.0", __class__=GateFirst), f"{MIDDLE}.ff.net.2", False,
                          "first the value and then the gate; in theirs: .*first the gate and then the value"),
    "GEGLU by tanh": (put(f"{MIDDLE}.ff.net.0", __class__=Tanh), f"{MIDDLE}.ff.net.2", False, "in theirs: .*by tanh"),
    "no residual": (put(MIDDLE, __class__=NoResidual), f"{MIDDLE}.norm3", False,
                    f"theirs lacks an addition: of what goes into {MIDDLE}.norm2"),
    "no time": (put("middle_block.0", __class__=NoTime), "middle_block.0.out_layers.0", False,
                "theirs lacks an addition: of what comes out of middle_block.0.emb_layers.1"),
    "folded wrongly": (put("middle_block.1", __class__=Folded), "middle_block.1.proj_out", False,
                       "what goes in: dimensions 2 and 3 are swapped"),
    "folded by a reshape alone": (put("middle_block.1", __class__=Refolded), "middle_block.1.proj_out", False,
                                  "what goes in: the same numbers in another order"),
    "sines first": (put("", __class__=Reordered, sines_first=True), "time_embed.0", False,
                    "halves of dimension 1 are swapped"),
    "skip first": (put("", __class__=Reordered, skip_first=True), "output_blocks.0.0.in_layers.0", False,
                   "halves of dimension 1 are swapped"),
    "skips in another order": (put("", __class__=Reordered, queue=True), "output_blocks.2.0.in_layers.0", False,
                               "only 64 to 95 of the 96 along dimension 1"),
    "a scaled output": (put("", __class__=Reordered, scale=0.5), "output", None, "ours is 2 times theirs"),
}  # fmt: skip


@pytest.mark.parametrize(("fault", "layer", "inputs_agree", "hint"), FAULTS.values(), ids=FAULTS)
def test_a_fault_is_found_at_its_layer(unet, theirs, fault, layer, inputs_agree, hint):
    fault(theirs)
    found = compare(unet, theirs, INPUTS)
    assert not found.equal and found.first.ours == found.first.theirs == layer
    assert found.first.verdict == "differ" and found.first.difference > 2e-5 or "NaN" in hint
    where = {True: "Its inputs agree", False: "Its inputs differ already", None: "after the last layer"}[inputs_agree]
    assert where in found.conclusion
    assert re.search(hint, found.hints[0]) and len(found.hints) == 1 + ("NaN" in hint), found.hints
    at = found.rows.index(found.first)
    assert {row.verdict for row in found.rows[:at]} <= {"agree"} and found.rows[-1].verdict == "differ"
    assert any(line.startswith(f">  {layer}") and "they part here" in line for line in str(found).splitlines())
    with pytest.raises(AssertionError, match=f"part at (the )?{re.escape(layer)}"):
        found.check()


def test_numbers_are_those_of_the_outputs(unet, theirs):
    one_row(theirs)
    row = compare(unet, theirs, INPUTS).first
    x, y = (F.linear(INPUTS[2], transformer(model).attn2.to_k.weight) for model in (unet, theirs))
    assert (row.kind, row.shape, row.input_difference) == ("Linear", "[2, 7, 64]", 0)
    assert row.difference == pytest.approx((x - y).abs().max().item(), rel=1e-6)
    assert row.size == pytest.approx(max(x.abs().max().item(), y.abs().max().item()), rel=1e-6)
    assert row.relative == row.difference / row.size
    assert compare(unet, theirs, INPUTS, tolerance=1.0).equal


def test_a_different_shape_is_reported_as_such():
    """A convolution that is given a picture of another size is not to blame."""
    ours, theirs = (nn.Sequential(nn.Upsample(scale_factor=n), nn.Conv2d(2, 3, 1)) for n in (2, 3))
    theirs.load_state_dict(ours.state_dict())
    found = compare(ours.eval(), theirs.eval(), draw(0, 1, 2, 4, 4))
    assert found.first.shape == "[1, 3, 8, 8] / [1, 3, 12, 12]" and math.isnan(found.first.difference)
    assert "Its inputs have another shape, so look at what happens to the inputs before it" in found.conclusion
    assert found.hints == ["what goes in: the shape is [1, 2, 8, 8] in ours and [1, 2, 12, 12] in theirs"]


def test_a_fault_that_does_not_change_the_output_is_reported(randomise, unet, theirs):
    """eps 1e-6 for 1e-5 hardly changes an output of random weights; zeros hide what is before them."""
    theirs.out[0].eps = 1e-6
    nn.init.zeros_(theirs.out[2].weight)
    nn.init.zeros_(theirs.out[2].bias)
    ours = copy.deepcopy(theirs)
    ours.out[0].eps = 1e-5
    found = compare(ours, theirs.train(), INPUTS)
    assert found.equal and theirs.training and not ours.training
    zeros, settings = found.hints  # without dropout, train mode changes nothing, and is not worth a word
    assert zeros.endswith(": out.2")
    assert settings.endswith("out.0 (eps is 1e-05 in ours and 1e-06 in theirs)")


def test_dropout_is_drawn_from_the_same_random_state_in_both(randomise):
    ours = randomise(UNetModel(replace(CONFIG, dropout=0.5)))
    before = torch.random.get_rng_state()
    found = compare(ours.train(), copy.deepcopy(ours), INPUTS)
    assert found.equal and re.match("ours is in train mode, with 1[0-9] layers that drop out", found.hints[0])
    assert torch.equal(torch.random.get_rng_state(), before)
    found = compare(ours, copy.deepcopy(ours).eval(), INPUTS)
    assert found.first.ours == "input_blocks.1.0.out_layers.3" and "inputs differ" in found.conclusion


def test_networks_with_other_weights_are_told_to_share_them(unet, theirs, randomise):
    found = compare(unet, randomise(theirs, seed=1), INPUTS)
    assert found.first.ours == "time_embed.0" and found.conclusion.startswith("They part at time_embed.0 (Linear")
    assert "its weight differs" in found.hints[0]
    assert re.fullmatch(r"(\d+) of \1 pairs of layers have other weights: first give both the same", found.hints[1])


def test_a_dtype_is_named(unet, theirs):
    wide = nn.Linear(4, 4)
    found = compare(wide, copy.deepcopy(wide).bfloat16(), draw(0, 2, 4), draw(0, 2, 4).bfloat16())
    assert found.first.ours == "Linear" and "ours computes in float32 and theirs in bfloat16" in found.hints


# -- layers too many, too few, or in another order -----------------------------------------------------------------


def test_an_extra_layer_is_one_layer_too_many(unet, theirs, randomise):
    theirs.middle_block[0].in_layers.append(randomise(nn.Conv2d(64, 64, 1), seed=5))
    for found, word in ((compare(unet, theirs, INPUTS), "theirs"), (compare(theirs, unet, INPUTS), "ours")):
        assert found.first.name == "middle_block.0.in_layers.3" and found.first.verdict == f"only in {word}"
        assert f"part at {found.first.name} (Conv2d, [2, 64, 4, 4]), which is only in {word}. The" in found.conclusion
        assert sum("only" in row.verdict for row in found.rows) == 1
        assert all(row.ours == row.theirs for row in found.rows if row is not found.first)


def test_an_extra_layer_that_changes_nothing_is_named(unet, theirs):
    theirs.middle_block[0].in_layers.append(nn.Conv2d(64, 64, 1))
    nn.init.dirac_(theirs.middle_block[0].in_layers[3].weight)
    nn.init.zeros_(theirs.middle_block[0].in_layers[3].bias)
    found = compare(unet, theirs, INPUTS)
    assert found.equal and found.hints == [
        "layers without a counterpart, which change nothing: middle_block.0.in_layers.3"
    ]


def test_a_missing_and_an_extra_layer_elsewhere_are_not_taken_for_a_pair(unet, theirs, randomise):
    ours = copy.deepcopy(unet)
    ours.middle_block[2].in_layers.append(randomise(nn.Conv2d(64, 64, 1), seed=5))
    theirs.middle_block[0].in_layers.append(randomise(nn.Conv2d(64, 64, 1), seed=6))
    rows = compare(ours, theirs, INPUTS).rows
    alone = {row.name: row.verdict for row in rows if "only" in row.verdict}
    assert alone == {"middle_block.2.in_layers.3": "only in ours", "middle_block.0.in_layers.3": "only in theirs"}
    assert all(row.ours == row.theirs for row in rows if row.name not in alone)


class Net(nn.Module):
    """Attention, with a layer that is used twice. With `first`: keys before queries, the skip first, other names."""

    def __init__(self, first: bool):
        super().__init__()
        self.first = first
        names = ("shortcut", "query", "key", "value", "proj_out") if first else "sqkvo"
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

    def forward(self, x):
        skip, q, k, v, out = self.layers.values()
        if self.first:
            s, k, q, v = skip(x), k(x), q(x), v(x)
            return s + out(out((q @ k.mT).softmax(-1) @ v))
        q, k, v = q(x), k(x), v(x)
        return out(out((q @ k.mT).softmax(-1) @ v)) + skip(x)


def test_layers_in_another_order_are_paired_by_what_they_hold(randomise):
    first, last = Net(True).eval(), randomise(Net(False))
    first.load_state_dict(dict(zip(first.state_dict(), last.state_dict().values(), strict=True)))
    found = compare(last, first, draw(0, 2, 3, 8)).check()
    assert [(row.ours, row.theirs) for row in found.rows] == [
        ("layers.q", "layers.query"), ("layers.k", "layers.key"), ("layers.v", "layers.value"),
        ("layers.o", "layers.proj_out"), ("layers.o (call 2)", "layers.proj_out (call 2)"),
        ("layers.s", "layers.shortcut"), ("output", "output"),
    ]  # fmt: skip
    with torch.no_grad():
        first.layers["key"].weight[0, 0] += 1
    found = compare(last, first, draw(0, 2, 3, 8))
    assert (found.first.ours, found.first.theirs) == ("layers.k", "layers.key")


# -- other people's networks ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def diffusers_unet(diffusers, unet):
    """diffusers' UNet with our weights, their names translated by its own reader of CompVis checkpoints."""
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 64), layers_per_block=1, cross_attention_dim=24,
        down_block_types=("CrossAttnDownBlock2D",) * 2, up_block_types=("CrossAttnUpBlock2D",) * 2,
        attention_head_dim=(2, 4),  # which is their number
    ).eval()  # fmt: skip
    state = {f"model.diffusion_model.{name}": w for name, w in unet.state_dict().items()}
    model.load_state_dict(diffusers.loaders.single_file_utils.convert_ldm_unet_checkpoint(state, model.config))
    return model


@pytest.fixture(scope="module")
def vaes(diffusers, randomise):
    ours = randomise(AutoencoderKL(AutoencoderConfig(ch=32, ch_mult=(1, 2))))
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=2,
    ).eval()  # fmt: skip
    state = {f"first_stage_model.{name}": w.clone() for name, w in ours.state_dict().items()}
    theirs.load_state_dict(diffusers.loaders.single_file_utils.convert_ldm_vae_checkpoint(state, theirs.config))
    return ours, theirs


def their_inputs():
    return dict(zip(("sample", "timestep", "encoder_hidden_states"), INPUTS, strict=True))


def test_every_layer_of_the_unet_pairs_and_agrees_with_diffusers(unet, diffusers_unet):
    found = compare(unet, diffusers_unet, INPUTS, their_inputs()).check()
    assert found.hints == [] and {row.verdict for row in found.rows} == {"agree"}
    names = {row.ours: row.theirs for row in found.rows}
    layers = [layer for layer in unet.modules() if list(layer.parameters(recurse=False))]
    assert len(names) == len(set(names.values())) == len(layers) + 1
    assert names["time_embed.2"] == "time_embedding.linear_2" and names["output"] == "output"
    assert names["input_blocks.3.0.skip_connection"] == "down_blocks.1.resnets.0.conv_shortcut"
    assert names[f"{MIDDLE}.attn2.to_k"] == "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"


@pytest.mark.parametrize(("ours", "theirs"), [
    (f"{MIDDLE}.attn2.to_k", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"),
    ("output_blocks.1.0.emb_layers.1", "up_blocks.0.resnets.1.time_emb_proj"),
    ("out.0", "conv_norm_out"),
])  # fmt: skip
def test_a_perturbed_weight_of_diffusers_is_found_under_both_names(unet, diffusers_unet, ours, theirs):
    model = copy.deepcopy(diffusers_unet)
    with torch.no_grad():
        model.get_submodule(theirs).weight.view(-1)[5] += 0.5
    found = compare(unet, model, INPUTS, their_inputs())
    assert (found.first.ours, found.first.theirs) == (ours, theirs)
    assert len(found.hints) == 1 and "its weight differs by up to 0.5" in found.hints[0]
    assert f"part at {ours} / {theirs} (" in found.conclusion and "Its inputs agree" in found.conclusion


def test_every_layer_of_the_vae_pairs_and_agrees_with_diffusers(vaes):
    """Convolutions of 1x1 with Linear layers, [b c h w] with [b hw c]; through methods, and distributions."""
    ours, theirs = vaes
    x, z = draw(1, 2, 3, 8, 12), draw(2, 2, 4, 4, 6)
    rows = []
    for networks, inputs in (
        ((ours.encode, theirs.encode), (x, x)),
        ((ours.decode, theirs.decode), (z, z)),
        ((ours, theirs), ((x, False), x)),
    ):  # fmt: skip
        found = compare(*networks, *inputs).check()
        assert {row.verdict for row in found.rows} == {"agree"}
        rows += found.rows
    row = next(row for row in rows if row.ours == "encoder.mid.attn_1.q")
    assert (row.theirs, row.kind) == ("encoder.mid_block.attentions.0.to_q", "Conv2d / Linear")
    assert row.shape == "[2, 64, 4, 6] / [2, 24, 64]"


def test_every_layer_of_clip_pairs_and_agrees_with_transformers(transformers, randomise):
    config = CLIPTextConfig(vocab_size=700, max_length=16, width=48, layers=2, heads=3, projection_dim=24)
    ours = randomise(CLIPTextModel(config))
    theirs = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=700, max_position_embeddings=16, hidden_size=48, projection_dim=24, intermediate_size=192,
            num_hidden_layers=2, num_attention_heads=3, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    ).eval()  # fmt: skip
    tower = getattr(theirs, "text_model", theirs)
    tower.load_state_dict(ours.text_model.state_dict())
    ids = torch.randint(2, 700, (2, 16), generator=torch.Generator().manual_seed(0))
    found = compare(ours, theirs, ids, {"input_ids": ids}).check()
    assert {row.verdict for row in found.rows} == {"agree"} and len(found.rows) == 2 + 2 * 8 + 1 + 1
    tower.encoder.layers[1].mlp.activation_fn = nn.GELU()
    found = compare(ours, theirs, ids)
    assert found.first.ours == "text_model.encoder.layers.1.mlp.fc2" and len(found.hints) == 1
    assert re.search(r"ours: quick-GELU\(.+fc1\); in theirs: GELU\(.+fc1\)$", found.hints[0])


# -- errors, and what is left behind -------------------------------------------------------------------------------


def test_a_network_that_stops_tells_where_and_why(unet, theirs):
    """A wrong width in the middle: everything before it agrees, nothing after it was reached."""
    theirs.middle_block[0].emb_layers[1] = nn.Linear(100, 64)
    found = compare(unet, theirs, INPUTS)
    assert not found.equal and found.first is None and found.errors.keys() == {"theirs"}
    assert "Theirs stopped in middle_block.0.emb_layers.1 (Linear), which was given [2, 128]" in found.conclusion
    assert "cannot be multiplied" in found.conclusion and "pairs of layers agree" in found.conclusion
    assert found.hints[0].endswith("its weight has the shape [64, 128] in ours and [64, 100] in theirs")
    verdicts = [row.verdict for row in found.rows]
    at = verdicts.index("error in theirs")
    assert found.rows[at].ours == "middle_block.0.emb_layers.1"
    assert set(verdicts[:at]) == {"agree"} and set(verdicts[at + 1 :]) == {"not reached"}
    assert "error in theirs" in str(found)
    with pytest.raises(AssertionError, match="stopped in middle_block"):
        found.check()


def test_an_error_of_other_names_is_paired_with_our_layer(unet, diffusers_unet):
    model = copy.deepcopy(diffusers_unet)
    model.mid_block.resnets[0].conv1 = nn.Conv2d(60, 64, 3, padding=1)
    found = compare(unet, model, INPUTS, their_inputs())
    row = next(row for row in found.rows if row.verdict == "error in theirs")
    assert (row.ours, row.theirs) == ("middle_block.0.in_layers.2", "mid_block.resnets.0.conv1")
    assert {row.verdict for row in found.rows} == {"agree", "error in theirs", "not reached"}


def test_both_may_stop_and_outside_of_any_layer(unet):
    found = compare(unet, unet, (INPUTS[0], INPUTS[1]), (draw(0, 2, 9, 8, 8), *INPUTS[1:]))
    assert found.rows == [] and found.errors.keys() == {"ours", "theirs"}
    assert str(found).startswith("Ours stopped in UNetModel, which was given [2, 4, 8, 8], with ValueError: this UNet")
    assert "context of width 24, and none was given" in found.conclusion and "x has 9" in found.conclusion
    assert "No layer was compared" in found.conclusion


def test_a_missing_return_is_reported():
    class Forgetful(nn.Linear):
        def forward(self, x):
            super().forward(x)

    found = compare(Forgetful(4, 4), nn.Linear(4, 4), draw(0, 2, 4))
    assert found.errors["ours"].endswith("returned no tensor, but a NoneType: is a return missing?")


def test_a_network_may_catch_the_error_of_a_layer():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 4)

        def forward(self, x):
            try:
                return self.a(x)
            except RuntimeError:
                return self.b(x)

    ours = Careful().eval()
    found = compare(ours, copy.deepcopy(ours), draw(0, 2, 4)).check()
    assert [row.ours for row in found.rows] == ["b", "output"] and found.hints == []


def test_nothing_is_left_behind(unet, theirs):
    """No hook, no other random state, no other buffer; also where a network stops."""
    norm = nn.BatchNorm2d(64)
    theirs.middle_block[0].out_layers[0] = norm.train()
    weights = {name: w.clone() for name, w in theirs.state_dict().items()}
    state = torch.random.get_rng_state()
    x = INPUTS[0].clone()
    for inputs in (INPUTS, INPUTS[:2]):
        compare(unet, theirs, inputs)
        assert hooks(unet) == hooks(theirs) == 0
    assert torch.equal(torch.random.get_rng_state(), state) and torch.equal(INPUTS[0], x)
    for name, weight in theirs.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_what_is_written_in_place_does_not_spoil_the_comparison():
    class InPlace(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](x.mul_(2)).relu_()).add_(1)

    class OutOfPlace(nn.Sequential):
        def forward(self, x):
            return self[1](self[0](2 * x).relu()) + 1

    ours, theirs = (kind(nn.Linear(4, 4), nn.Linear(4, 4)) for kind in (InPlace, OutOfPlace))
    x = draw(0, 2, 4)
    theirs.load_state_dict(ours.state_dict())
    compare(ours, theirs, x).check()
    assert torch.equal(x, draw(0, 2, 4))


def test_only_modules_can_be_compared(unet):
    with pytest.raises(TypeError, match="two modules, or methods of modules, not a function"):
        compare(unet, lambda *inputs: inputs[0], INPUTS)
