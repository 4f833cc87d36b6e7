"""The world of bouncing digits, and its judge."""

import pytest
import torch

from sage_diffusion.kv.bouncing import (
    FRAMES,
    SIDE,
    SPRITE,
    WALL,
    empty_scene,
    render,
    sample_clips,
    vote,
)


@pytest.fixture(scope="module")
def clips():
    return sample_clips(48, seed=3)


def test_a_digit_is_hidden_first_then_seen_hidden_and_seen_again(clips):
    visible = torch.stack([clips.visible(frame) for frame in range(FRAMES)], 1)
    assert (visible[:, 0] == 0).all()
    for row, hidden in zip(visible, clips.hidden, strict=True):
        seen = (row > 0).int()
        assert seen[:hidden].sum() == 0 and seen[hidden : hidden + 13].all()
        assert seen[hidden + 13 : hidden + 24].sum() == 0 and seen[hidden + 24 :].all()
    assert (visible[:, -1] == SPRITE).all()


def test_places_bounce_off_the_border(clips):
    places = [clips.place(frame) for frame in range(100)]
    x, y = (torch.stack(axis, 1) for axis in zip(*places, strict=True))
    for axis in (x, y):
        assert axis.min() >= 0 and axis.max() <= SIDE - SPRITE
    assert (x.diff(dim=1).abs() == 2).all()
    assert torch.equal(y.diff(dim=1).abs(), clips.speed.abs()[:, None].expand(-1, 99))


def test_pictures_show_the_digit_left_of_the_wall_and_nothing_else(clips):
    pictures = render(clips)
    assert pictures.shape == (48, FRAMES, 3, SIDE, SIDE)
    assert pictures.min() >= -1 and pictures.max() <= 1
    differs = (pictures != empty_scene()).any(2)
    assert not differs[..., WALL:].any()
    for frame in range(FRAMES):
        x, y = clips.place(frame)
        for clip in range(0, 48, 7):
            left, top = int(x[clip]), int(y[clip])
            outside = differs[clip, frame].clone()
            outside[top : top + SPRITE, left : left + SPRITE] = False
            assert not outside.any()


def test_splits_do_not_meet_and_are_the_same_every_time():
    def starts(clips):
        return set(zip(*(value.tolist() for value in vars(clips).values()), strict=True))

    train, test = sample_clips(3000, 0), sample_clips(3000, 0, "test")
    assert not starts(train) & starts(test)
    assert starts(train) == starts(sample_clips(3000, 0))
    assert len(train) == 3000 and set(train.identity.tolist()) == set(range(40))
    with pytest.raises(ValueError, match="split must be 'train' or 'test'"):
        sample_clips(1, 0, "all")


@pytest.mark.parametrize("noise", [0.0, 0.5])
def test_the_judge_sees_identity_and_place(clips, noise):
    pictures = render(clips)
    random = torch.Generator().manual_seed(0)
    for frame in (FRAMES - 1, FRAMES - 2):
        chosen = clips.visible(frame) >= 6
        part = pictures[chosen, frame]
        found = vote(part + noise * torch.randn(part.shape, generator=random), 6)
        x, y = clips.place(frame)
        right = (found.identity == clips.identity[chosen]) & (found.x == x[chosen])
        right &= found.y == y[chosen]
        assert right.float().mean() > (0.99 if noise == 0 else 0.9)


def test_the_judge_is_not_fooled_by_another_digit(clips):
    pictures = render(clips)
    other = sample_clips(48, seed=4)
    found = vote(pictures[:, FRAMES - 1])
    assert (found.identity == other.identity).float().mean() < 0.2
