"""A user's mistake ends in one clear message and exit code 2, and nothing is lost."""

import json
import shutil

import pytest
import torch
import torch.distributed as dist

from aifactory_train.checkpoint.manager import CheckpointManager, committed_steps, step_folder
from aifactory_train.rundir import RunDir
from training_runs import aifactory, aifactory_here, assert_refused, launch, launched, write_recipe


def test_a_misspelt_key_and_a_wrong_type_are_both_named_at_once(words, tmp_path):
    recipe = write_recipe(tmp_path, **words, optim__learning_rate=1e-3, train__seed="one")
    done = launch(recipe, tmp_path / "run")
    assert_refused(done, "optim.learning_rate", "did you mean lr", "train.seed", f"{recipe}:", "'one'")
    assert not (tmp_path / "run").exists()


def test_a_missing_recipe_and_a_missing_source_are_named(words, tmp_path):
    assert_refused(launch(tmp_path / "nowhere.yaml", tmp_path / "run"), "nowhere.yaml")
    gone = {"corpus": tmp_path / "gone.jsonl", "prepared": tmp_path / "prepared"}
    assert_refused(aifactory_here("prepare", write_recipe(tmp_path, **gone)), "gone.jsonl")


def test_an_empty_corpus_is_named(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(json.dumps({"text": ""}) + "\n")
    paths = {"corpus": tmp_path / "corpus.jsonl", "prepared": tmp_path / "prepared"}
    assert_refused(aifactory("prepare", write_recipe(tmp_path, **paths)), "empty corpus", "words")


def test_a_launch_without_prepared_tokens_says_what_to_type(words, tmp_path):
    recipe = write_recipe(tmp_path, corpus=words["corpus"], prepared=tmp_path / "prepared")
    assert_refused(launch(recipe, tmp_path / "run"), "aifactory-train prepare")


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused(words, tmp_path):
    folder = tmp_path / "prepared"
    tokenizer = {"data__tokenizer": {"path": str(words["prepared"] / "tokenizer")}, "model__vocab_size": 300}
    recipe = write_recipe(tmp_path, corpus=words["corpus"], prepared=folder, **tokenizer)
    assert aifactory_here("prepare", recipe).returncode == 0
    assert_refused(launch(recipe, tmp_path / "run"), "the tokenizer has 384 entries", "300", "model.vocab_size")
    bigger = write_recipe(tmp_path, **words, data__tokenizer={"train_vocab_size": 1024})
    assert_refused(aifactory_here("prepare", bigger), "train_vocab_size 1024 is larger than model.vocab_size 512")


def test_a_row_longer_than_the_model_allows_is_refused(words, tmp_path):
    recipe = write_recipe(tmp_path, **words, data__seq_len_tokens=256)
    assert_refused(launch(recipe, tmp_path / "run"), "seq_len_tokens 256", "max_seq_len_tokens 128")


def test_a_batch_that_cannot_be_divided_is_refused_with_one_that_can(words, tmp_path):
    recipe = write_recipe(tmp_path, **words)
    assert_refused(launch(recipe, tmp_path / "run", 3), "train.global_batch_tokens")
    odd = write_recipe(tmp_path, **words, train__global_batch_tokens=1000)
    assert_refused(launch(odd, tmp_path / "run"), "1000 is not divisible by data.seq_len_tokens 64", "nearest: 1024")
    micro = write_recipe(tmp_path, **words, train__micro_batch_rows=5)
    assert_refused(launch(micro, tmp_path / "run"), "micro_batch_rows")


@pytest.fixture(scope="module")
def finished(words, tmp_path_factory):
    """A run of one rank that is done; tests take a copy."""
    folder = tmp_path_factory.mktemp("finished")
    launched(write_recipe(folder, **words), folder / "run")
    return folder / "run"


def test_a_run_folder_of_another_recipe_is_refused_and_untouched(words, finished, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    before = RunDir(run).events.read_text()
    other = write_recipe(tmp_path, **words, optim__lr=1e-4)
    assert_refused(launch(other, run), "belongs to another recipe", "optim.lr (0.003 there, 0.0001 now)", "--run")
    assert RunDir(run).events.read_text() == before
    assert committed_steps(RunDir(run).checkpoints) == [10, 20]


@pytest.fixture
def unfinished(words, finished, tmp_path):
    """A run of which step 10 is committed, ready to resume: recipe, run folder, folder of step 10."""
    run = shutil.copytree(finished, tmp_path / "run")
    recipe = write_recipe(tmp_path, **words)
    folder = RunDir(run).checkpoints
    shutil.rmtree(step_folder(folder, 20))
    events = RunDir(run).events
    events.write_text("".join(line for line in events.read_text().splitlines(True) if '"finish"' not in line))
    return recipe, run, step_folder(folder, 10)


def test_a_checkpoint_of_another_model_is_refused(unfinished):
    recipe, run, step = unfinished
    commit = json.loads((step / "COMMIT").read_text())
    commit["model"]["ffn_size"] = 96
    (step / "COMMIT").write_text(json.dumps(commit))
    assert_refused(launch(recipe, run), "another model", "ffn_size: checkpoint 96, recipe 128")
    assert_refused(aifactory_here("export", run), "another model", "ffn_size")


def test_a_damaged_checkpoint_file_is_refused_by_name_and_the_advice_works(unfinished, tmp_path):
    recipe, run, step = unfinished
    data = step / "__0_0.distcp"
    raw = bytearray(data.read_bytes())
    raw[len(raw) // 2] ^= 1
    data.write_bytes(raw)
    assert_refused(launch(recipe, run, 2), "__0_0.distcp", "sha256 differs", "starts from step 0")
    data.write_bytes(raw[:-100])
    assert_refused(launch(recipe, run), "__0_0.distcp", "COMMIT says")
    (step / ".metadata").write_bytes((step / ".metadata").read_bytes()[:100])
    assert_refused(launch(recipe, run), ".metadata has 100 bytes")
    shutil.move(step, tmp_path / "elsewhere")
    assert launched(recipe, run)[-1]["step"] == 20


def test_a_damaged_shard_is_refused_by_name_at_launch(words, tmp_path):
    prepared = tmp_path / "prepared"
    shutil.copytree(words["prepared"], prepared)
    recipe = write_recipe(tmp_path, corpus=words["corpus"], prepared=prepared)
    shard = prepared / "words" / "shard-00000.tokens"
    raw = bytearray(shard.read_bytes())
    raw[100] ^= 1
    shard.write_bytes(raw)
    assert_refused(launch(recipe, tmp_path / "run", 2), "shard-00000.tokens is damaged")
    shard.write_bytes(raw[:-10])
    assert_refused(launch(recipe, tmp_path / "run2"), "shard-00000.tokens has")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_while_saving_keeps_the_commit_before_it(words, tmp_path, small_disk, ranks):
    disk = small_disk(4)
    recipe, run = write_recipe(tmp_path, **words), disk / "run"
    ballast = disk / "ballast"
    # One commit is about 1.7 MB: with this the first one fits and the second one does not.
    ballast.write_bytes(bytes(1_500_000))
    done = launch(recipe, run, ranks)
    assert_refused(done, "No space left on device while saving step 20", "step 10 is safe", "launch again")
    assert committed_steps(RunDir(run).checkpoints) == [10]
    ballast.unlink()
    done = launch(recipe, run, ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resumed at step 10" in done.stdout


def test_a_save_after_a_failed_one_is_kept_if_there_is_room_by_then(tmp_path, small_disk):
    disk = small_disk(4)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        manager = CheckpointManager(disk / "checkpoints", 2, True, torch.device("cpu"))
        state = {"model": {"w": torch.arange(200_000.0)}}
        (disk / "ballast").write_bytes(bytes(3_800_000))
        manager.save(10, 100, state, {})
        manager._thread.join()
        (disk / "ballast").unlink()
        manager.save(20, 200, state, {})
        assert committed_steps(disk / "checkpoints") == [20]
    finally:
        dist.destroy_process_group()


def test_a_step_folder_without_commit_does_not_exist(unfinished):
    recipe, run, _ = unfinished
    left = step_folder(RunDir(run).checkpoints, 20)
    left.mkdir()
    (left / "__0_0.distcp").write_bytes(b"half")
    assert launched(recipe, run)[-1]["step"] == 20
    assert committed_steps(RunDir(run).checkpoints) == [10, 20]


def test_a_run_folder_that_is_a_file_or_cannot_be_made_is_refused(words, tmp_path):
    (tmp_path / "file").write_text("")
    recipe = write_recipe(tmp_path, **words)
    assert_refused(launch(recipe, tmp_path / "file"), "the run folder is a file")
    assert_refused(aifactory("plan", recipe, "--run", "/proc/nowhere"), "/proc/nowhere")


def test_a_loss_that_is_no_number_stops_the_run_and_is_not_saved(words, tmp_path):
    recipe = write_recipe(tmp_path, **words, optim__lr=1e30, schedule__warmup_tokens=0)
    done = launch(recipe, tmp_path / "run")
    assert done.returncode == 4 and "Traceback" not in done.stdout + done.stderr
    assert "at step" in done.stdout and "nothing of this state was saved" in done.stdout
    assert committed_steps(RunDir(tmp_path / "run").checkpoints) == []


def test_an_offline_wandb_run_lands_in_the_run_folder(words, tmp_path):
    recipe = write_recipe(tmp_path, **words, metrics__wandb="offline")
    launched(recipe, tmp_path / "run")
    files = list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 1000
