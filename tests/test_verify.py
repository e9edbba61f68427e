"""minisd verify: a report on a file of CompVis's, held against diffusers."""

import pytest
import torch

from minisd import load, save
from minisd.instruments import verify


@pytest.mark.filterwarnings("ignore:the prompt is longer")
def test_a_report_says_that_all_layers_agree_and_which_one_does_not(diffusers, transformers, tmp_path, monkeypatch):
    file = tmp_path / "a.ckpt"
    save(load("tiny", "cpu"), file)
    report = verify.verify(file, tmp_path / "a.png", device="cpu")
    assert report.count("as in diffusers") == 4 and "DIFFERS" not in report
    assert (tmp_path / "a.png").stat().st_size > 0
    for word in ("sha256", "torch 2", "diffusers 0", "265; ", "picture"):
        assert word in report
    assert len(report.splitlines()) < 20

    with pytest.raises(ValueError, match="this machine has no device 'tpu'"):
        verify.verify(file, tmp_path / "a.png", device="tpu")

    def misread(*arguments, **options):  # what a mistake in our reading would do
        sd = load(*arguments, **options)
        with torch.no_grad():
            sd.model.diffusion_model.middle_block[1].proj_in.bias.add_(1)
        return sd

    monkeypatch.setattr(verify, "load", misread)
    report = verify.verify(file, tmp_path / "a.png", device="cpu")
    assert report.count("as in diffusers") == 3 and "DIFFERS" in report and "middle_block.1.proj_in" in report
