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
    args = _parser().parse_args(arguments)
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
    _configured(stages, "tune", "stage 2: LoRA on the language model, and the projector", _tune)

    evaluate = stages.add_parser("eval", help="let a LLaVA answer benchmarks")
    actions = evaluate.add_subparsers(metavar="ACTION", required=True)
    _configured(actions, "run", "answer a suite through lmms-eval's own task code", _eval_run)

    compare = stages.add_parser(
        "compare", help="towers side by side, with statistics: terminal, JSON and one HTML page"
    )
    holds = "holds tower/, align/, tune/ and eval/{real,blank,shuffled}/; its name becomes the tower's"
    compare.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help=holds)
    compare.add_argument(
        "--data", required=True, type=Path, help="the benchmarks' files, where the page's pictures come from"
    )
    compare.add_argument("--out", required=True, type=Path, help="gets report.html and report.json")
    compare.set_defaults(run=_compare)

    study = stages.add_parser("study", help="many runs that differ in one thing, and the figure of what it does")
    kinds = study.add_subparsers(metavar="KIND", required=True)
    _configured(kinds, "captions", "text length × strategy × captions: the paper's inverse effect", _study_captions)

    _configured(stages, "plan", "what a run will take: FLOPs, memory, days, storage, bandwidth; no GPU needed", _plan)

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
            lines += _keys(nested, f"{prefix}{field.name}.")
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


def _eval_run(args: argparse.Namespace) -> None:
    import eval_suites
    from eval_suites.benchmarks import EvalConfig, run_suite

    run_suite(_config(EvalConfig, args, eval_suites))


def _compare(args: argparse.Namespace) -> None:
    from eval_suites.report import Entry, compare

    compare([Entry.of(folder) for folder in args.runs], args.out, args.data)


def _study_captions(args: argparse.Namespace) -> None:
    import eval_suites
    from eval_suites.study import CaptionStudyConfig, study_captions

    study_captions(_config(CaptionStudyConfig, args, eval_suites))


def _plan(args: argparse.Namespace) -> None:
    import clips_core
    from clips_core.plan import PlanConfig, plan

    if args.keys:
        print("\n".join(_keys(PlanConfig)))
        raise SystemExit(0)
    assert clips_core.__file__ is not None
    plan(Path(clips_core.__file__).parent, args.settings)


def _demo(args: argparse.Namespace) -> None:
    from eval_suites.demo import run_demo

    run_demo(args.smoke, args.out)


if __name__ == "__main__":
    sys.exit(main())
