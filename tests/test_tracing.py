"""A trace holds what was really computed: it can be computed again, line by line, from what stands before it."""

import pytest
import torch

from minisd.instruments.tracing import STAGES, trace


@pytest.fixture(scope="module")
def drawing(sd):
    return trace(sd, "a red fox", steps=4, guidance_scale=3.0, seed=5)


@pytest.fixture(scope="module")
def training(sd):
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return trace(sd, "a red fox", image=image, t=300, seed=5)


def test_it_is_the_drawing_of_txt2img(sd, drawing):
    out = sd.txt2img("a red fox", steps=4, guidance_scale=3.0, seed=5, sampler="ddim")
    torch.testing.assert_close(drawing["x"].value, out.pictures)
    torch.testing.assert_close(drawing["z"].value, out.trajectory[-1].x)
    assert drawing["timesteps"].value.tolist() == [step.t for step in out.trajectory]


def test_each_value_follows_from_those_before_it(sd, drawing):
    values = {entry.symbol: entry.value for entry in drawing}
    t = drawing["t"].value
    assert list(values)[:5] == ["prompt", "tokens", "c", "c_empty", "timesteps"]
    torch.testing.assert_close(sd.cond_stage_model.transformer(values["tokens"]), values["c"])
    torch.testing.assert_close(sd.apply_model(values["x_T"], t, values["c_empty"]), values["eps_uncond"])
    torch.testing.assert_close(sd.apply_model(values["x_T"], t, values["c"]), values["eps_cond"])
    guided = values["eps_uncond"] + 3.0 * (values["eps_cond"] - values["eps_uncond"])
    torch.testing.assert_close(guided, values["eps"])
    torch.testing.assert_close(sd.schedule.predict_start_from_noise(values["x_T"], t, guided), values["x0"])
    torch.testing.assert_close(sd.model.diffusion_model.time_embed(values["t_emb"]), values["emb"])
    a_prev = sd.schedule.alpha_bar(values["timesteps"][1].item())
    x_prev = values[f"x_{values['timesteps'][1]}"]
    torch.testing.assert_close(a_prev**0.5 * values["x0"] + (1 - a_prev) ** 0.5 * values["eps"], x_prev)
    torch.testing.assert_close(sd.decode_first_stage(values["z/s"] * sd.scale_factor), values["x"])


def test_the_last_step_leads_to_the_last_latent(sd, drawing):
    last = trace(sd, "a red fox", steps=4, guidance_scale=3.0, seed=5, step=3)
    torch.testing.assert_close(last["x_0"].value, drawing["z"].value)
    torch.testing.assert_close(last["x"].value, drawing["x"].value)


def test_without_guidance_there_is_one_noise(sd):
    symbols = [entry.symbol for entry in trace(sd, "a fox", steps=2, guidance_scale=1.0)]
    assert "eps" in symbols and "eps_cond" not in symbols and "eps_uncond" not in symbols


def test_training_follows_the_equations(sd, training):
    values = {entry.symbol: entry.value for entry in training}
    t = values["t"]
    torch.testing.assert_close(sd.q_sample(values["z"], t, values["noise"]), values["x_t"])
    torch.testing.assert_close(sd.apply_model(values["x_t"], t, values["c"]), values["output"])
    torch.testing.assert_close((values["output"] - values["noise"]).square().mean(), values["loss"])
    torch.testing.assert_close(sd.encode_first_stage(values["x"]).mode(), values["E(x)"])


@pytest.mark.parametrize("which", ["drawing", "training"])
def test_printed_it_fits_110_columns_and_says_everything(request, which):
    told = request.getfixturevalue(which)
    text = str(told)
    assert max(map(len, text.split("\n"))) <= 110
    for entry in told:
        assert entry.symbol in text and f"{entry.name} " in text and entry.equation in text and entry.compvis in text
        assert isinstance(entry.value, str) or str(list(entry.value.shape)) in text
        assert entry.stage in STAGES and entry.file.endswith(".py")
    assert told[0].value == "a red fox" and len(list(told)) == len(told)
    assert "[1, 16]         int64" in str(told["tokens"])
    t = told["t"].value.item()
    assert f"{t:8} {t:8}\n" in str(told["t"])  # the smallest and the largest
    with pytest.raises(KeyError, match="there is no 'x_7'"):
        told["x_7"]


def test_what_trace_cannot_follow_is_refused(sd, make_sd):
    with pytest.raises(ValueError, match="prompt must be one string"):
        trace(sd, ["a", "b"])
    with pytest.raises(ValueError, match="step must lie in"):
        trace(sd, "a", steps=3, step=3)
    with pytest.raises(ValueError, match="t must lie in"):
        trace(sd, "a", image=torch.zeros(3, 32, 32), t=1000)
    from minisd.conditions import ClassConfig

    with pytest.raises(ValueError, match="conditioned on a prompt alone, but this one has another condition"):
        trace(make_sd(cond_stage=ClassConfig(4, 32)), "a")
