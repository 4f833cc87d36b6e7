"""``benchmarks/causal_video.py``: rows, their table and their picture."""

import pytest

pytest.importorskip("diffusers")

from from_file import from_file

bench = from_file("benchmarks/causal_video.py")


def test_rows_are_measured_shown_and_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "SEEN", 30)
    monkeypatch.setattr(bench, "STEPS", 1)
    arguments = ["window 4", "k4v4", "--clips", "2", "--out", str(tmp_path)]
    bench.main(arguments)
    table = (tmp_path / "table.md").read_text().splitlines()
    cells = {line.split("|")[1].strip(): line.split("|")[2:] for line in table[2:]}
    assert list(cells) == ["exact", "window 4", "k4v4"]
    assert cells["exact"][1].strip() == "16.00" and cells["exact"][7].strip() == "inf"
    assert cells["window 4"][0].strip() == "4" and cells["window 4"][1].strip() == "2.00"
    assert 4 < float(cells["k4v4"][1]) < 8
    assert (tmp_path / "causal_video.png").stat().st_size > 1000
    assert "predicted bound, H100 SXM" in capsys.readouterr().out

    def run(*_):
        raise AssertionError("a finished row was run again")

    monkeypatch.setattr(bench, "run", run)
    bench.main(arguments)


def test_the_peak_is_the_packed_past_one_layer_and_a_tile(capsys):
    bench.main(["exact", "k2v2", "k4v4", "--memory"])
    rows = [line.split("|")[2:-1] for line in capsys.readouterr().out.splitlines()[2:]]
    assert len(rows) == 3 and float(rows[0][0]) == 16
    for bits, kept, layer, tile, peak, most in (map(float, row) for row in rows):
        assert abs(kept + layer + tile - peak) <= 2 and peak <= most
        assert layer == 1536 and abs(bits / 16 * 7680 - kept) < 3


def test_rows_that_do_not_exist_are_refused(capsys):
    with pytest.raises(SystemExit):
        bench.main(["k9"])
    assert "a row must be one of exact, window 4" in capsys.readouterr().err


def test_decoding_costs_less_where_a_block_has_more_frames():
    for card in bench.CARDS:
        one, three = (bench.predicted_overhead(card, 2.5, frames) for frames in (1, 3))
        assert 0 < three < one / 2
