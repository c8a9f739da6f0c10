"""``klong sync-check`` and ``klong gpu-check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from megatron_klong.cli.shared import AsJson, counter, print_json
from megatron_klong.config import validate_config


def sync_check(
    hf_dir: Annotated[
        Path, typer.Argument(help="Hugging Face folder, such as `klong convert export` makes.")
    ],
    tensor: Annotated[int, typer.Option(help="TP of the Megatron ranks.")] = 1,
    pipeline: Annotated[int, typer.Option(help="PP.")] = 1,
    expert: Annotated[int, typer.Option(help="EP.")] = 1,
    syncs: Annotated[int, typer.Option(help="Optimizer steps, each followed by a sync.")] = 3,
    precision: Annotated[str, typer.Option(help="fp32 or bf16, of Megatron and vLLM.")] = "fp32",
    transfer: Annotated[str, typer.Option(help="How weights travel: shm, nccl or ipc.")] = "shm",
    server_devices: Annotated[
        str | None, typer.Option(help="GPUs of the server, as in CUDA_VISIBLE_DEVICES; nccl needs others.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder that keeps logs and result.json.")] = None,
    as_json: AsJson = False,
) -> None:
    """Serve a model by vLLM beside Megatron ranks: compare log-probs, then train and sync, and compare.

    Megatron, transformers and vLLM start from the same weights. Then Megatron trains on random
    tokens, its weights go into the running server, and after each sync probes must agree.

    Example: klong sync-check exported --tensor 2 --pipeline 2 --expert 2
    """
    from megatron_klong.checks.sync import SyncCheck, check_sync

    values = {
        "model": hf_dir, "parallel": {"tensor": tensor, "pipeline": pipeline, "expert": expert},
        "syncs": syncs, "precision": precision, "transfer": transfer, "server_devices": server_devices,
    }  # fmt: skip
    check = validate_config(SyncCheck, values, "of the sync check")
    with counter("waiting for the server and the ranks,", "looks") as tick:
        result = check_sync(check, out, tick)
    if as_json:
        print_json(result)
        return
    for prompt in result.parity:
        pairs = (("Megatron - transformers", prompt.megatron_transformers),
                 ("Megatron - vLLM", prompt.megatron_vllm))  # fmt: skip
        shown = ", ".join(
            f"{pair} {'not run' if value is None else format(value, '.1e')}" for pair, value in pairs
        )
        print(f"parity, {prompt.tokens:>4} tokens: {shown}")
    for sync in result.syncs:
        seconds = sum(sync.seconds.values())
        print(
            f"sync {sync.version}: {sync.tensors} tensors, {sync.bytes / 1e6:,.1f} MB in {seconds:.2f} s "
            f"(sending {sync.seconds['send']:.2f} s); largest difference {sync.difference:.1e}"
        )
    if not result.syncs:
        return
    shown = "would have shown" if result.moved > result.tolerance else "could have passed"
    print(
        f"all within {result.tolerance:g}; every step moved log-probs by {result.moved:.2g} or more, so a "
        f"sync that did nothing {shown}"
    )


def gpu_check(
    out: Annotated[Path, typer.Option(help="Folder for the logs and gpu-check.json.")] = Path("gpu-check"),
    as_json: AsJson = False,
) -> None:
    """Run whatever of parity, train steps and weight syncs this machine can, and print a table.

    Rows that lack a package or a GPU are not run, and say so. Exit code 1 when a row failed.

    Example: klong gpu-check --out gpu-check-h100
    """
    from rich.console import Console
    from rich.table import Table

    from megatron_klong.checks.gpu import ROWS, gpu_check

    console = Console(stderr=True)
    with console.status(f"{ROWS[0].title} ...") as status:
        done = 0

        def on_row(_outcome: object) -> None:
            nonlocal done
            done += 1
            if done < len(ROWS):
                status.update(f"{ROWS[done].title} ...")

        result = gpu_check(out, on_row)
    if as_json:
        print_json(result)
    else:
        table = Table("check", "", "s", "found")
        for row in result.rows:
            table.add_row(row.title, row.status, f"{row.seconds:.0f}" if row.seconds else "", row.detail)
        versions = [f"{name} {found or 'absent'}" for name, found in result.machine.packages.items()]
        print(f"{', '.join(result.machine.gpus) or 'no GPU on this machine'}; {', '.join(versions)}")
        Console().print(table)
        print(f"written to {out / 'gpu-check.json'}")
    raise typer.Exit(int(any(row.status == "failed" for row in result.rows)))
