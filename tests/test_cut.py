"""Cut out of its file, a segment decodes to the frames that a local job gives it."""

import itertools
from fractions import Fraction

import av
import pytest
from media import make_clip
from sample_clips import SHORT_GOPS, SOURCES, assert_same

from pipeline.cut import CutPlan, CutVideo, NotCut, check_joints
from pipeline.decode import VideoSource
from pipeline.errors import SourceError
from pipeline.segments import Segment, plan

NOT_CUT = {"x264 no index", "mpeg2", "avi"}
"""Their packets do not say when each frame is shown."""
CUT_WRONG = {"x264 refresh"}
"""What looks like a keyframe needs frames from before it."""


def plan_of(path, length, **trim):
    with VideoSource(path, **trim) as source:
        return CutPlan(source, length)


def decoded(cut, path, length):
    """The frames of one segment, decoded by themselves, and the hash of the one before."""
    video = CutVideo(cut, path)
    frames = plan(video.frames(), length)
    kept = []
    for frame in frames:
        kept.append(frame)
        if frame.ends_segment:
            break
    return kept, video.before


@pytest.mark.parametrize("trim", [{}, {"start_seconds": 1.1, "end_seconds": 2.9}])
@pytest.mark.parametrize("name", sorted(SOURCES))
def test_segments_cut_out_are_those_of_a_local_job(tmp_path, name, trim):
    suffix, what = SOURCES[name]
    clip = {"n_frames": 90, "time_base": Fraction(1, 12800), "noise": True, **what}
    path = make_clip(tmp_path / f"in{suffix}", **clip)
    local = list(plan(VideoSource(path, **trim).frames(), 15))
    cuts = plan_of(path, 15, **trim)
    if name in NOT_CUT:
        assert not cuts.spans
        return
    parts = [decoded(cut, path, 15) for cut in cuts.cuts(cuts.spans)]
    ends = [part[-1].ends_segment for part, _ in parts]
    joints = [before == end for (_, before), end in zip(parts[1:], ends, strict=False)]
    if name in CUT_WRONG:
        assert not all(joints)
        return
    assert all(joints)
    assert len(parts) > 1
    assert_same(list(itertools.chain(*(part for part, _ in parts))), local)


def test_a_segment_is_read_without_what_comes_before_the_keyframe(tmp_path):
    path = make_clip(tmp_path / "in.mkv", n_frames=100, options=SHORT_GOPS)
    cuts = plan_of(path, 10)
    assert [span.n_packets <= 10 + 1 + 11 + 3 for span in cuts.spans] == [True] * len(cuts.spans)
    assert sum(span.n_frames for span in cuts.spans) == 100


def test_a_file_with_hardly_a_keyframe_is_one_part(tmp_path):
    """Else each part would hold all packets from the only keyframe on."""
    few = make_clip(tmp_path / "few.mkv", n_frames=200, options={"g": "1000", "sc_threshold": "0"})
    more = make_clip(tmp_path / "more.mkv", n_frames=200, options={"g": "50", "sc_threshold": "0"})
    for path, is_cut in ((few, False), (more, True)):
        with VideoSource(path) as source:
            plan = CutPlan(source, 8)
        assert bool(plan.spans) == is_cut
        assert plan.whole().n_packets == 200


def test_a_part_whose_pictures_are_of_another_size_is_none(tmp_path):
    """Its planes would be cropped, or were not to be had: the file is tried as a whole, and that
    names the frame where the size changes."""
    path = joined_of_two_sizes(tmp_path, (96, 64), (128, 96))
    cuts = plan_of(path, 24)
    assert len(cuts.spans) == 4
    first, *others = cuts.cuts(cuts.spans)
    assert len(decoded(first, path, 24)[0]) == 24
    for cut, number in zip(others, (48, 48, 71), strict=True):
        with pytest.raises(NotCut, match=f"frame {number} is 128x96 .*, the first one 96x64"):
            decoded(cut, path, 24)
    with VideoSource(path) as source, pytest.raises(SourceError, match="frame 48 is 128x96"):
        list(source.frames())


def test_a_format_that_only_the_container_tells_is_that_of_the_parts(tmp_path):
    """Full range in the header of a Matroska file, and nothing of it in the H.264 stream."""
    plain = make_clip(tmp_path / "plain.mkv", n_frames=60, options=SHORT_GOPS)
    path = tmp_path / "in.mkv"
    with av.open(plain) as source, av.open(path, "w") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        stream.codec_context.color_range = 2
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    with VideoSource(path) as source:
        assert source.coded[2] == "yuvj420p"
        local = list(plan(source.frames(), 15))
    cuts = plan_of(path, 15)
    parts = [decoded(cut, path, 15)[0] for cut in cuts.cuts(cuts.spans)]
    assert len(parts) > 1
    assert_same(list(itertools.chain(*parts)), local)


def joined_of_two_sizes(folder, *sizes):
    """48 frames of each, keyframes every 12, in one Matroska track that says the first size."""
    path = folder / "in.mkv"
    with av.open(path, "w") as out:
        for number, size in enumerate(sizes):
            part = make_clip(
                folder / f"{number}.ts", n_frames=48, size=size, time_base=Fraction(1, 25),
                options={"g": "12", "bf": "0"}, pts=[48 * number + i for i in range(48)],
            )  # fmt: skip
            with av.open(part) as source:
                if number == 0:
                    stream = out.add_stream_from_template(source.streams.video[0])
                for packet in source.demux(video=0):
                    if packet.size:
                        packet.stream = stream
                        out.mux(packet)
    return path


def test_a_truncated_file_is_refused_when_it_is_planned(tmp_path):
    path = make_clip(
        tmp_path / "in.mp4", n_frames=50, size=(160, 120), noise=True, options=SHORT_GOPS,
        container_options={"movflags": "faststart"},
    )  # fmt: skip
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 8 // 10])
    with pytest.raises(SourceError, match=r"in\.mp4"):
        plan_of(path, 10)


def test_a_file_that_changed_after_it_was_planned_is_refused(tmp_path):
    path = make_clip(tmp_path / "in.mkv", n_frames=60, options=SHORT_GOPS)
    cuts = plan_of(path, 10)
    make_clip(path, n_frames=20, options=SHORT_GOPS)
    with pytest.raises(SourceError, match="changed"):
        list(cuts.cuts(cuts.spans[-1:]))


def segment(index, before, last):
    return Segment(index, 0, 1, 1, "", 0, 0, last, before)


def test_joints_are_checked():
    check_joints("in.mkv", [segment(0, "", "a"), segment(1, "a", "b"), segment(2, "b", "c")])
    with pytest.raises(NotCut, match="segment 2"):
        check_joints("in.mkv", [segment(0, "", "a"), segment(1, "a", "b"), segment(2, "x", "c")])


def test_a_part_that_is_not_as_planned_is_refused(tmp_path):
    path = make_clip(tmp_path / "in.mkv", n_frames=30, options=SHORT_GOPS)
    cuts = plan_of(path, 10)
    (cut,) = cuts.cuts(cuts.spans[1:2])
    video = CutVideo(cut, path)
    list(itertools.islice(video.frames(), 3))
    good = Segment(0, 400, 800, 10, "", 0, 0, "last")
    assert video.checked(good).index == 1
    for wrong in (Segment(0, 400, 800, 9, "", 0, 0, ""), Segment(0, 400, 760, 10, "", 0, 0, "")):
        with pytest.raises(NotCut, match="planned as 10 frames"):
            video.checked(wrong)


def test_a_whole_file_that_is_too_large_is_refused_by_name(tmp_path, monkeypatch):
    path = make_clip(
        tmp_path / "in.avi", codec="mpeg4", options={"bf": "2"}, time_base=Fraction(1, 25)
    )  # fmt: skip
    cuts = plan_of(path, 10)
    assert cuts.whole().data == path.read_bytes()
    monkeypatch.setattr("pipeline.cut.MAX_WHOLE_BYTES", 10)
    with pytest.raises(SourceError, match=r"in\.avi.*restore-video"):
        cuts.whole()
