import pytest

from vqa.results import BY_QUESTION_TYPE, KINDS, METRICS, Result, accuracy_of, unit_of


def test_a_result_survives_json():
    one = Result("latency_p50_ms", 3.5, 3.1, 4.0, arm="random weights", engine="eager", world_size=2)
    assert Result.from_row(one.as_row()) == one and one.as_row()["unit"] == "ms"


def test_an_unknown_metric_or_engine_is_refused_with_the_nearest_name():
    with pytest.raises(KeyError, match="did you mean accuracy_blind"):
        Result("acuracy_blind", 1.0)
    with pytest.raises(KeyError, match="no engine"):
        Result("accuracy", 1.0, engine="eager, 2 threads")


@pytest.mark.parametrize("metric", BY_QUESTION_TYPE)
def test_a_metric_by_question_type_has_the_unit_of_the_whole(metric):
    assert unit_of(accuracy_of("left_right", metric)) == METRICS[metric].unit


def test_everything_named_has_a_sentence():
    assert all(len(sentence.split()) >= 3 for sentence in KINDS.values())
    assert all(len(metric.sentence.split()) >= 3 for metric in METRICS.values())
