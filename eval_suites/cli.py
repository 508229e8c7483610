"""The command `clips-llava`: its help is the table of contents.

Every stage takes an optional recipe (the name of a shipped one, or a .yaml file) and `key=value` overrides. Imports stay inside
the stages, so that `--help` answers at once.
"""

import argparse
import dataclasses
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from clips_core.config import load_settings
from clips_core.errors import InputError, Stopped


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one stage. Exit status 0: done; 2: bad input, said in one line; 130: interrupted, run again to go on; 75: the same, at a
    scheduler's request (SIGTERM)."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    if rest:  # argparse takes no second group of settings, behind an option
        if not hasattr(args, "settings") or any(word.startswith("-") or "=" not in word for word in rest):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.settings += rest
    try:
        args.run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(
            f"\ninterrupted{f': {interrupt}' if str(interrupt) else '; run the same command to go on'}", file=sys.stderr
        )
        return 130
    except Stopped as stopped:
        print(f"\nstopped: {stopped}", file=sys.stderr)
        return 75  # EX_TEMPFAIL: try again
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="clips-llava", description="Does a better vision tower make a better LLaVA?")
    stages = parser.add_subparsers(metavar="STAGE", required=True)

    data = stages.add_parser("data", help="make training data: the sample world, or shards from your own pictures")
    kinds = data.add_subparsers(metavar="KIND", required=True)
    _configured(kinds, "world", "draw the sample world: pictures, captions, conversations, benchmarks", _world)
    _configured(kinds, "build", "a folder of pictures and captions → webdataset shards", _build)
    _configured(kinds, "join", "captions from parquet (Recap-DataComp-1B) → the samples of webdataset tars", _join)
    _configured(
        kinds, "check", "look through data before a run: faults, lengths, copies of evaluation pictures", _check
    )
    _configured(
        kinds, "recaption", "shards → the same with synthetic captions, by a local VLM or an endpoint", _recaption
    )

    _configured(
        kinds, "conversations", "look through LLaVA conversations: faults by line, and a repaired file", _conversations
    )

    _configured(stages, "pretrain", "shards → a CLIPS (or baseline) vision tower, exported", _pretrain)

    _configured(stages, "embed", "pictures (and captions) → features in parquet, by any CLIPS model", _embed)
    _configured(stages, "caption", "pictures → captions by a run's own caption decoder, one pass each", _caption)

    tower = stages.add_parser("tower", help="what a tower is: size, tokens, processor, hash")
    tower.add_argument(
        "spec",
        metavar="SPEC",
        help="clips:RUN|FOLDER|hf-hub:…, open_clip:ARCH/PRETRAINED|FOLDER|hf-hub:…, or hf:FOLDER|ORG/NAME",
    )
    tower.add_argument("--image-size", type=int, help="another resolution, in pixels")
    tower.add_argument("--export", type=Path, metavar="FOLDER", help="write its Hugging Face carrier there")
    tower.set_defaults(run=_tower)

    _configured(stages, "align", "stage 1: train the projector between a tower and a language model", _align)
    _configured(stages, "tune", "stage 2: the language model (LoRA, QLoRA or in full) and the projector", _tune)

    chat = stages.add_parser("chat", help="talk to one LLaVA, or to two side by side: terminal or web page")
    chat.add_argument(
        "models", nargs="+", type=Path, metavar="MODEL", help="run of stage 1 or 2, its adapter/, or a LLaVA's folder"
    )
    chat.add_argument("--web", action="store_true", help="a page in the browser (needs gradio)")
    chat.add_argument("--host", default="127.0.0.1", help="of the page; default: this machine alone")
    chat.add_argument("--port", type=int, default=7860)
    chat.add_argument("--max-new-tokens", type=int, default=512)
    chat.add_argument("--temperature", type=float, default=0.0, help="0: greedy")
    chat.set_defaults(run=_chat)

    push = stages.add_parser("push", help="upload a finished run's model, card and manifest to the Hugging Face hub")
    push.add_argument("folder", type=Path, metavar="RUN")
    push.add_argument("repository", metavar="ORG/NAME")
    push.add_argument("--private", action="store_true")
    push.add_argument("--license", metavar="ID", help="such as apache-2.0; without it the card says unknown")
    push.set_defaults(run=_push)

    evaluate = stages.add_parser("eval", help="let a LLaVA answer benchmarks")
    actions = evaluate.add_subparsers(metavar="ACTION", required=True)
    _configured(actions, "run", "answer a suite through lmms-eval's own task code", _eval_run)
    actions.choices["run"].add_argument("--exact", action="store_true", help="one question at a time")
    _configured(actions, "judge", "RUN --model NAME --endpoint URL: a judge scores MM-Vet's answers", _eval_judge)
    flags = {
        "model": str,
        "endpoint": str,
        "api-key-env": str,
        "repeats": int,
        "temperature": float,
        "max-new-tokens": int,
    }
    for flag, kind in flags.items():
        actions.choices["judge"].add_argument(f"--{flag}", type=kind)
    _configured(actions, "import", "FOLDER of plain lmms-eval (--log_samples) → records like ours", _eval_import)

    fetch = actions.add_parser(
        "fetch", help="a suite's files from the hub into a folder, for machines without a network"
    )
    fetch.add_argument("suite", metavar="SUITE", help="the name of a shipped suite, or a .yaml file")
    fetch.add_argument("--to", required=True, type=Path, metavar="FOLDER")
    fetch.set_defaults(run=_eval_fetch)
    look = actions.add_parser("check", help="a suite's files: all that is missing or wrong, at once")
    look.add_argument("suite", metavar="SUITE", help="the name of a shipped suite, or a .yaml file")
    look.add_argument("--data", required=True, type=Path, metavar="FOLDER")
    look.set_defaults(run=_eval_check)
    _configured(actions, "loss", "a LLaVA's loss on conversations that it was not trained on", _eval_loss)
    _configured(actions, "tower", "SPEC … SUITE …: zero-shot, retrieval, linear probe and kNN of towers", _eval_tower)

    compare = stages.add_parser(
        "compare", help="towers side by side, with statistics: terminal, JSON and one HTML page"
    )
    holds = "holds tower/, align/, tune/ and eval/{real,blank,shuffled}/; its name becomes the tower's"
    compare.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help=holds)
    compare.add_argument("--data", type=Path, help="the benchmarks' files, where the page's pictures come from")
    compare.add_argument(
        "--out", required=True, type=Path, help="gets report.html, report.json, report.csv, report.tex, categories.csv"
    )
    compare.add_argument("--bundle", type=Path, metavar="FILE.tar.gz", help="an archive that recomputes every figure")
    compare.add_argument(
        "--waive", nargs="+", default=[], metavar="KEY", help="settings that may differ besides the towers"
    )
    compare.add_argument(
        "--reference", type=Path, metavar="FOLDER", help="of a `study reference`: the anchor, shown on the page"
    )
    compare.set_defaults(run=_compare)

    study = stages.add_parser("study", help="many runs that differ in one thing, and the figure of what it does")
    kinds = study.add_subparsers(metavar="KIND", required=True)
    _configured(kinds, "captions", "text length × strategy × captions: the paper's inverse effect", _study_captions)
    _configured(kinds, "methods", "pretraining methods at equal pictures and equal FLOPs, over seeds", _study_methods)

    _configured(
        kinds, "towers", "stages 1 and 2, benchmarks and comparison of towers, all else the same", _study_towers
    )
    _configured(
        kinds,
        "reference",
        "LLaVA-1.5 as released and trained here, beside what is published: the anchor",
        _study_reference,
    )
    kinds.choices["reference"].add_argument("--dry-run", action="store_true", help="print the commands and stop")
    towers = kinds.choices["towers"]
    towers.add_argument(
        "--towers", nargs="+", metavar="[NAME=]SPEC", help="the towers, as `clips-llava tower` takes them"
    )
    towers.add_argument("--llm", help="the language model: smollm2, a folder or a hub name")
    towers.add_argument("--seeds", type=int, metavar="N", help="trainings of each tower: seeds 0 … N - 1")
    towers.add_argument("--image-mode", choices=("square", "pad"), help="how pictures become square, for all towers")
    towers.add_argument("--dry-run", action="store_true", help="print the commands and stop")

    takes = "what a run will take ([pretrain | align | tune | eval] first): FLOPs, memory, hours, disk; no GPU needed"
    _configured(stages, "plan", takes, _plan)

    demo = stages.add_parser("demo", help="the whole path on the sample world: two towers, two LLaVAs, one page")
    demo.add_argument("--smoke", action="store_true", help="the same path in under 3 minutes, too small to learn much")
    demo.add_argument("--out", type=Path, help="default: runs/demo, or runs/smoke")
    demo.set_defaults(run=_demo)
    return parser


def _configured(stages: Any, name: str, summary: str, run: Callable[[argparse.Namespace], Any]) -> None:
    """A stage whose arguments are `[RECIPE] [key=value …]`; `--keys` lists the keys."""
    stage = stages.add_parser(
        name, help=summary, description=summary, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    stage.add_argument("settings", nargs="*", metavar="RECIPE | key=value",
                       help="first, if at all, names or .yaml files of recipes; then dotted overrides")  # fmt: skip
    stage.add_argument("--keys", action="store_true", help="list the keys with their types and defaults, and stop")
    stage.set_defaults(run=run)


def _config(cls: type, args: argparse.Namespace, package: ModuleType) -> Any:
    """The stage's config from the command line."""
    if args.keys:
        print("\n".join(_keys(cls)))
        raise SystemExit(0)
    assert package.__file__ is not None
    return load_settings(cls, Path(package.__file__).parent, args.settings)


def _keys(cls: type, prefix: str = "") -> list[str]:
    lines = []
    for field in dataclasses.fields(cls):
        kind = field.type
        nested = next((t for t in (kind, *getattr(kind, "__args__", ())) if dataclasses.is_dataclass(t)), None)
        if isinstance(nested, type):
            name = f"{field.name}.NAME" if get_origin(kind) is dict else field.name
            lines += _keys(nested, f"{prefix}{name}.")
            continue
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        if isinstance(default, FieldInfo):
            default = default.get_default(call_default_factory=True)
        lines.append(f"{prefix}{field.name}: {_type_name(kind)}{' (required)' if required else f' = {default}'}")
    return lines


def _type_name(kind: Any) -> str:
    """A type as one would write it, without what only validates it."""
    if get_origin(kind) is Annotated:
        return _type_name(get_args(kind)[0])
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return " | ".join(map(_type_name, get_args(kind)))
    if kind is types.NoneType:
        return "null"
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if isinstance(kind, type) and not get_args(kind):
        return kind.__name__
    inside = ", ".join(map(_type_name, get_args(kind)))
    return f"{get_origin(kind).__name__}[{inside}]" if inside else str(kind)


# ---------------------------------------------------------------------------------------------------------------------
# One function a stage
# ---------------------------------------------------------------------------------------------------------------------


def _world(args: argparse.Namespace) -> None:
    import clips_core
    from clips_core.world import WorldConfig, make_world

    make_world(_config(WorldConfig, args, clips_core))


def _build(args: argparse.Namespace) -> None:
    import clips_core
    from clips_core.build import BuildConfig, build_shards

    build_shards(_config(BuildConfig, args, clips_core))


def _join(args: argparse.Namespace) -> None:
    import clips_core
    from clips_core.join import JoinConfig, join_captions

    join_captions(_config(JoinConfig, args, clips_core))


def _check(args: argparse.Namespace) -> None:
    import clips_core
    from clips_core.check import CheckConfig, check_data

    check_data(_config(CheckConfig, args, clips_core))


def _conversations(args: argparse.Namespace) -> None:
    import llava_bridge
    from llava_bridge.conversation_check import ConversationCheckConfig, check_conversations

    check_conversations(_config(ConversationCheckConfig, args, llava_bridge))


def _recaption(args: argparse.Namespace) -> None:
    import clips_core
    from clips_core.recaption import RecaptionConfig, recaption

    recaption(_config(RecaptionConfig, args, clips_core))


def _embed(args: argparse.Namespace) -> None:
    import clips_core
    from clips_core.embed import EmbedConfig, embed_pictures

    embed_pictures(_config(EmbedConfig, args, clips_core))


def _caption(args: argparse.Namespace) -> None:
    import clips_core
    from clips_core.decoding import CaptionConfig, caption_pictures

    caption_pictures(_config(CaptionConfig, args, clips_core))


def _pretrain(args: argparse.Namespace) -> None:
    import clips_core
    from clips_core.config import PretrainConfig

    config = _config(PretrainConfig, args, clips_core)
    from clips_core.train import pretrain

    pretrain(config)


def _tower(args: argparse.Namespace) -> None:
    from llava_bridge.towers import export_tower, load_tower

    tower = load_tower(args.spec, args.image_size)
    print(tower.describe())
    if args.export is not None:
        export_tower(tower, args.export)


def _align(args: argparse.Namespace) -> None:
    import llava_bridge
    from llava_bridge.config import AlignConfig

    config = _config(AlignConfig, args, llava_bridge)
    from llava_bridge.train import align

    align(config)


def _tune(args: argparse.Namespace) -> None:
    import llava_bridge
    from llava_bridge.config import TuneConfig

    config = _config(TuneConfig, args, llava_bridge)
    from llava_bridge.train import tune

    tune(config)


def _chat(args: argparse.Namespace) -> None:
    if len(args.models) > 2:
        raise InputError("chat takes one model, or two to compare")
    if args.web:
        from llava_bridge.chat_page import chat_page

        chat_page(args.models, args.host, args.port, args.max_new_tokens, args.temperature)
    else:
        from llava_bridge.chat import chat

        chat(args.models, args.max_new_tokens, args.temperature)


def _push(args: argparse.Namespace) -> None:
    from llava_bridge.card import push

    print(push(args.folder, args.repository, args.private, args.license))


def _eval_run(args: argparse.Namespace) -> None:
    import eval_suites
    from eval_suites.benchmarks import EvalConfig, run_suite

    args.settings += ["exact=true"] if args.exact else []
    run_suite(_config(EvalConfig, args, eval_suites))


def _eval_judge(args: argparse.Namespace) -> None:
    import eval_suites
    from eval_suites.judge import JudgeConfig, judge

    flags = ("model", "endpoint", "api_key_env", "repeats", "temperature", "max_new_tokens")
    said = {flag: value for flag in flags if (value := getattr(args, flag)) is not None}
    args.settings = [*_named(args.settings, "run"), *(f"{key}={value}" for key, value in said.items())]
    judge(_config(JudgeConfig, args, eval_suites))


def _eval_import(args: argparse.Namespace) -> None:
    import eval_suites
    from eval_suites.lmms_output import ImportConfig, import_output

    args.settings = _named(args.settings, "folder")
    import_output(_config(ImportConfig, args, eval_suites))


def _named(settings: Sequence[str], key: str) -> list[str]:
    """What is no `key=value` is the value of `key`: `FOLDER key=value …`."""
    return [setting if "=" in setting else f"{key}={setting}" for setting in settings]


def _eval_fetch(args: argparse.Namespace) -> None:
    from eval_suites.fetch import fetch_suite, table_of

    print(table_of(fetch_suite(args.suite, args.to)))


def _eval_check(args: argparse.Namespace) -> None:
    from eval_suites.fetch import check_suite, table_of

    print(table_of(check_suite(args.suite, args.data)))


def _eval_loss(args: argparse.Namespace) -> None:
    import llava_bridge
    from llava_bridge.held_out import HeldOutConfig, held_out_loss

    held_out_loss(_config(HeldOutConfig, args, llava_bridge))


def _eval_tower(args: argparse.Namespace) -> None:
    import eval_suites
    from eval_suites.towers.config import TowerEvalConfig, arrange

    args.settings = arrange(args.settings)
    config = _config(TowerEvalConfig, args, eval_suites)
    from eval_suites.towers.run import eval_towers

    eval_towers(config)


def _compare(args: argparse.Namespace) -> None:
    from eval_suites.bundle import write_bundle
    from eval_suites.records import entries_of
    from eval_suites.report import compare

    entries = [entry for folder in args.runs for entry in entries_of(folder)]
    compare(entries, args.out, args.data, waived=args.waive, reference=args.reference)
    if args.bundle is not None:
        write_bundle(args.bundle, entries, args.out, args.waive, args.reference)


def _study_captions(args: argparse.Namespace) -> None:
    import eval_suites
    from eval_suites.study import CaptionStudyConfig, study_captions

    study_captions(_config(CaptionStudyConfig, args, eval_suites))


def _study_methods(args: argparse.Namespace) -> None:
    import eval_suites
    from eval_suites.study_methods import MethodStudyConfig, study_methods

    study_methods(_config(MethodStudyConfig, args, eval_suites))


def _study_reference(args: argparse.Namespace) -> None:
    import eval_suites
    from eval_suites.reference import ReferenceConfig, study_reference

    args.settings += ["dry_run=true"] if args.dry_run else []
    study_reference(_config(ReferenceConfig, args, eval_suites))


def _study_towers(args: argparse.Namespace) -> None:
    import eval_suites
    from eval_suites.study_towers import TowerStudyConfig, overrides, study_towers

    args.settings += overrides(args.towers, args.llm, args.seeds, args.image_mode, args.dry_run)
    study_towers(_config(TowerStudyConfig, args, eval_suites))


def _plan(args: argparse.Namespace) -> None:
    from eval_suites.plan import choose_plan

    config, run, settings = choose_plan(args.settings)
    if args.keys:
        print("\n".join(_keys(config)))
        raise SystemExit(0)
    run(settings)


def _demo(args: argparse.Namespace) -> None:
    from eval_suites.demo import run_demo

    run_demo(args.smoke, args.out)


if __name__ == "__main__":
    sys.exit(main())
