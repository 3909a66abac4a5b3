"""The matrix of TIFF and DICOM kinds: none is read wrong."""

import pytest

from benchmarks.reader_matrix import dicom_kinds, judge, tiff_kinds


@pytest.mark.parametrize("suffix, kinds, least", [(".tif", tiff_kinds, 250), (".dcm", dicom_kinds, 60)])
def test_every_kind_is_right_or_refused(tmp_path, suffix, kinds, least):
    outcomes = [judge(kind, tmp_path / f"a{suffix}") for kind in kinds()]
    assert len(outcomes) > least
    assert [outcome for outcome in outcomes if outcome.verdict == "WRONG"] == []
    assert sum(outcome.verdict == "refused" for outcome in outcomes) < len(outcomes) / 8
