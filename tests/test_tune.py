"""The command that tunes Triton kernels, and the file it writes."""

from __future__ import annotations

import json

import pytest
import torch

import crossvit_kernels as ck
from crossvit_kernels import tune
from crossvit_kernels.gpu import tables, tuned
from crossvit_kernels.ops.layernorm_ffn import configs as ffn_configs


@pytest.fixture
def tuned_file(tmp_path, monkeypatch):
    path = tmp_path / "tuned.json"
    monkeypatch.setenv(tuned.ENVIRONMENT_VARIABLE, str(path))
    tables.forget()
    yield path
    monkeypatch.delenv(tuned.ENVIRONMENT_VARIABLE)
    tables.forget()


def test_tune_writes_what_the_library_loads(tuned_file, triton_device, capsys) -> None:
    path = tuned_file
    sizes = ["--channels", "16", "--heads", "2", "--batch", "2", "--tokens", "20", "--limit", "2"]
    tried = []

    def second_is_faster(run) -> float:
        run()
        tried.append(1)
        return 2.0 - len(tried) % 2 * 0.5 if len(tried) > 2 else float(3 - len(tried))

    passes = ["--kernels", ",".join(tune.PASSES)]
    assert tune.main([*sizes, *passes, "--dtype", "fp16"], second_is_faster) == 0
    assert len(tried) == 8  # two candidates of four kernels
    assert "2.00x the table's" in capsys.readouterr().out
    entries = json.loads(path.read_text())
    assert len(entries) == 4
    tables.forget()
    device = torch.cuda.get_device_name() if triton_device == "cuda" else "interpreter"
    table = tune.PASSES["forward"]
    (config, *others), measured = table.candidates(device, 0, 16, 2)
    assert measured and config == tune.candidates(table, 0, 16, 2)[1]
    preferred = table.preferred(0, 16, 2)
    assert config != preferred and others == [*preferred.and_smaller()]
    assert table.candidates("another", 0, 16, 2) == ((*others,), False)
    x = torch.randn(2, 5, 16, device=triton_device)
    ck.attention_core(x, x, backend="triton")
    assert tune.main([*sizes, "--kernels", "forward", "--dtype", "fp32"]) == 0  # actually timed
    assert len(json.loads(path.read_text())) == 5  # the others are unchanged


def test_tune_blocks(tuned_file, triton_device, capsys, monkeypatch) -> None:
    """For every kernel of a block all candidates run, and the library uses the fastest."""
    monkeypatch.setattr(ffn_configs, "keeps_hidden", lambda *_: True)  # as of wide ones
    sizes = ["--channels", "32", "--heads", "2", "--batch", "1", "--tokens", "20", "--limit", "2"]
    kernels = ["--kernels", ",".join(tune.BLOCK_KERNELS)]
    times: list[float] = []

    def each_is_faster(run) -> float:
        run()
        times.append(1.0 / (1 + len(times)))
        return times[-1]

    assert tune.main([*sizes, *kernels, "--dtype", "fp16"], each_is_faster) == 0
    assert "no configuration" not in capsys.readouterr().out
    assert len(times) == 2 * len(tune.BLOCK_KERNELS)
    assert len(json.loads(tuned_file.read_text())) == len(tune.BLOCK_KERNELS)
    tables.forget()
    name_of_device = torch.cuda.get_device_name() if triton_device == "cuda" else "interpreter"
    sm = tables.sm(torch.device(triton_device))
    for kernel in ("ffn", "norm linear"):
        table = tune.BLOCK_KERNELS[kernel].table.for_rows(20, 2)
        assert table.name == kernel + " of few rows" * (kernel == "norm linear")
        (config, *_), measured = table.candidates(name_of_device, sm, 32, 2)
        assert measured and config == tune.candidates(table, sm, 32, 2)[1]
        assert config != table.preferred(sm, 32, 2)


@pytest.mark.parametrize("content", ["{", "[]", '{"%s": {"speed": 3}}', '{"%s": 1}'])
def test_a_file_that_is_no_measurement(content: str, tuned_file, triton_device) -> None:
    name_of_device = torch.cuda.get_device_name() if triton_device == "cuda" else "interpreter"
    tuned_file.write_text(content.replace("%s", tuned.key("forward", name_of_device, 8, 4)))
    x = torch.randn(1, 3, 8, device=triton_device)
    with pytest.raises(ValueError, match="expected what"):
        ck.attention_core(x, x, backend="triton")


def test_later_sms_of_a_family_have_its_exceptions() -> None:
    from crossvit_kernels.ops.layernorm_ffn.configs import FFN

    assert FFN.preferred(86, 192, 2) == FFN.preferred(89, 192, 2) == FFN.preferred(80, 192, 2)
    assert FFN.preferred(103, 384, 2) == FFN.preferred(100, 384, 2)
    assert len({FFN.preferred(sm, 384, 2) for sm in (80, 90, 100)}) == 3
