"""Stage 04: a typical user's history -> explicit interests, by an LLM or without one (paper 3.2.2, Eq. 3).

One prompt for each typical user, over exactly the events that training may see of that user. Answers are journaled as they
arrive: a run that was stopped, by whatever, goes on where it was, and an answer is never paid for twice while model, prompt
and parameters stay the same. Every typical user ends with interests; one without a usable answer gets the titles of its
history, and the reason is recorded.

    --llm offline    (default) a deterministic summariser over titles and category paths; no model, stamped `offline`
    --llm openai     any OpenAI-compatible server: --base-url or OPENAI_BASE_URL, --model; the key from OPENAI_API_KEY,
                     DASHSCOPE_API_KEY or --api-key-file
    --llm local      --model FOLDER, a transformers model with a chat template
    --llm recorded   --responses FILE in the shape of OpenAI's Batch output

Reads  01_preprocess/, 03_cluster_users/typical_users.npy int64 (clusters,)
Writes 04_infer_interests/
    requests.jsonl    one line a cluster: custom_id "<data set>/<user id>#<start of the request's SHA-256>", method, url, body
    responses.jsonl   the journal: Batch output lines, every answer and failure ever received here
    interests.jsonl   line c for cluster c: user (number), id, interests [text, ...] (at most 20), outcome, source, model,
                      key, notes. outcome: ok, repaired, truncated, refused, unparsable or failed; source: the back end, or
                      "titles"
    seen_events.npy   int64 (clusters, 2): the prompt of cluster c saw no event outside this range of the flat event arrays
    leakage.json      that none of these events belongs to validation or test users or is held out
    usage.json        counts of outcomes and sources, tokens, cost
With --task partition the same in 04_infer_interests/partition/, with groups.jsonl in place of interests.jsonl: user, id, items
[item number, ...] as shown, groups [{"name", "items": [1-based place in items, ...]}, ...], outcome, source, notes.

    python stages/04_infer_interests.py --dataset sample

prints the outcomes, the users on the fallback, tokens and cost. Exit codes: 0 finished; 1 a mistake in the input; 2 unknown
arguments; 3 stopped before all had an answer, run again to go on; 4 finished, but more than --max-fallback of the users are
on the fallback.
"""
import re
from collections import Counter
from pathlib import Path

import numpy as np
from tqdm import tqdm

from eimf import artifacts
from eimf.artifacts import Stage, UserError, load_array, save_array, save_json, save_lines
from eimf.chat import Budget, ChatClient, find_endpoint, request_tokens
from eimf.data import load_interactions, load_items, load_user_ids
from eimf.interests import PROMPTS, check_template
from eimf.llm import TOKENS, Journal, Local, Offline, Recorded, Responses, Stopped, usage_of
from eimf.offline import Summarizer
from eimf.prompts import Prompts, leakage, token_counter


def parse_arguments(argv):
    parser = artifacts.argument_parser(__doc__)
    add = parser.add_argument
    add("--llm", choices=["offline", "openai", "local", "recorded"], default="offline", help="where answers come from")
    add("--task", choices=["interests", "partition"], default="interests", help="what is asked about a history")
    add("--users", choices=["typical", "all"], default="typical", help="whose histories; all training users only for partition")
    add("--model", help="the model's name (paper: qwen-turbo), or the folder for --llm local")
    add("--base-url", help="server, such as http://localhost:8000/v1 (default: OPENAI_BASE_URL)")
    add("--api-key-file", type=Path, help="file that holds the key alone; a key is never given as an argument, which every "
        "user of the machine could read")
    add("--temperature", type=float, default=0.0, help="0 for the likeliest answer")
    add("--max-tokens", type=int, default=800, help="longest answer, in tokens")
    add("--json-mode", action="store_true", help="ask for response_format json_object; dropped if the server refuses it")
    add("--prompt-file", type=Path, help="your own prompt, with {history} and, if wanted, {max_interests} and {dataset}")
    add("--item-text", choices=["title", "title,categories"], help="how items are shown (default: title; offline: both)")
    add("--max-prompt-tokens", type=int, default=6000, help="longer histories keep their newest items")
    add("--prefix-only", action="store_true", help="hide the last 20 %% of each history too")
    group = parser.add_argument_group("recorded answers and batch files")
    add = group.add_argument
    add("--responses", type=Path, help="responses file for --llm recorded, .gz or plain")
    add("--match", choices=["hash", "user"], default="hash", help="how a recorded answer finds its request: same model, prompt "
        "and parameters, or the user in custom_id whatever the prompt")
    add("--allow-seen-histories", action="store_true",
        help="accept --match user although its answers may have seen what is held out")
    add("--export-requests", type=Path, metavar="FILE", help="write what has no answer yet as OpenAI Batch input, and stop")
    add("--import-responses", type=Path, action="append", default=[], metavar="FILE",
        help="take answers from Batch output into the journal and ask nothing; may be repeated")
    add("--reparse", action="store_true", help="read all journaled answers again and ask nothing")
    add("--finish-anyway", action="store_true", help="finish with the fallback for users that nothing was asked for")
    add("--shard", metavar="I/N", help="ask only every N-th prompt, into a journal of its own; a run without --shard joins them")
    group = parser.add_argument_group("faults and cost")
    add = group.add_argument
    add("--concurrency", type=int, default=32, help="most calls at once; fewer while the server is overloaded")
    add("--attempts", type=int, default=6, help="calls for one answer when the server fails; rate limits do not count")
    add("--answer-attempts", type=int, default=2, help="answers asked for when one cannot be used")
    add("--connect-timeout", type=float, default=10.0, help="seconds")
    add("--read-timeout", type=float, default=120.0, help="seconds for a whole answer")
    add("--patience", type=float, default=900.0, help="seconds under a rate limit without any answer before stopping")
    add("--give-up-after", type=int, default=5, help="failed requests in a row before stopping")
    add("--retry-failed", action="store_true", help="ask again where the server refused the request")
    add("--max-fallback", type=float, default=0.5, help="exit code 4 above this share of users on the fallback")
    add("--dry-run", action="store_true", help="print prompts, tokens and cost, and stop")
    add("--price-in", type=float, default=0.0, help="price of a million prompt tokens")
    add("--price-out", type=float, default=0.0, help="price of a million answer tokens")
    add("--max-cost", type=float, help="stop before this run costs more, in the prices' currency")
    add("--max-requests", type=int, help="stop before this run makes more HTTP calls, repeated ones included")
    add("--tokenizer", help="transformers folder to count tokens with (default: estimated; --llm local: its own)")
    group = parser.add_argument_group("local model")
    add = group.add_argument
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add("--batch-size", type=int, default=8, help="prompts generated at once")
    add("--threads", type=int, default=0, help="CPU threads, 0 = all")
    args = parser.parse_args(argv)
    if args.users == "all" and args.task != "partition":
        parser.error("--users all needs --task partition: interests.jsonl has one line a cluster")
    if args.max_cost is not None and not (args.price_in or args.price_out):
        parser.error("--max-cost needs --price-in and --price-out")
    if args.shard and not ((m := re.fullmatch(r"(\d+)/(\d+)", args.shard)) and 1 <= int(m[1]) <= int(m[2])):
        parser.error(f"--shard {args.shard}: expected I/N with 1 <= I <= N, such as 2/8")
    if args.export_requests and (args.import_responses or args.reparse):
        parser.error("--export-requests goes with neither --import-responses nor --reparse")
    if args.llm == "recorded" and not args.responses:
        parser.error("--llm recorded needs --responses FILE")
    for name in ("concurrency", "attempts", "answer_attempts", "give_up_after", "max_tokens", "max_prompt_tokens", "batch_size"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, found {getattr(args, name)}")
    return args


def make_backend(args, items, count, log):
    if args.llm == "offline":
        return Offline(Summarizer(items), args.task)
    if args.llm == "recorded":
        responses = Responses(args.responses, args.match)
        if responses.failed:
            log(f"{args.responses}: {responses.failed} lines are failures and were left out")
        # with --match user the answers belong to unknown prompts: their keys must never equal those of real requests
        label = args.model if args.match == "hash" else f"recorded@{artifacts.sha256(args.responses)[:16]}"
        if not label:
            raise UserError("--match hash needs the --model the answers were asked of; or use --match user")
        return Recorded(responses, label)
    if args.llm == "local":
        if not args.model:
            raise UserError("--llm local needs --model FOLDER")
        return Local(args.model, args.device, args.batch_size, args.threads)
    url, model, key = find_endpoint(args.base_url, args.model, args.api_key_file)
    budget = Budget(count, args.price_in, args.price_out, args.max_cost, args.max_requests)
    return ChatClient(url, model, key, args.concurrency, args.attempts, args.connect_timeout, args.read_timeout, args.patience,
                      args.give_up_after, budget, log)


def ask(prompts, backend, journal, args, log):
    """Fill the journal. Raises Stopped."""
    reuse = getattr(backend, "reusable", True)
    rounds = args.answer_attempts if args.llm in ("openai", "local") else 1
    for number in range(rounds):
        again = None if number == 0 else lambda entry, index: not prompts.parse(entry, index).usable
        todo = list(prompts.pending(journal, args.shard, again, reuse))
        if not todo:
            continue
        if number:
            log(f"{len(todo)} answers cannot be used and are asked for again")
        with tqdm(total=len(todo), desc=f"{args.llm} answers", unit="answer") as bar:
            for entry in backend.answers(map(prompts.request, todo)):
                if reuse or journal.get(entry["key"]) != entry:
                    journal.add(entry)
                bar.update()


def import_responses(path, prompts, journal, args, log):
    """Journal the answers of a Batch output file that belong to this run's requests."""
    responses, taken = Responses(path, "hash"), 0
    todo = prompts.pending(journal, args.shard)
    for entry in Recorded(responses, prompts.model).answers(map(prompts.request, todo)):
        if entry["response"]:
            journal.add(entry | {"source": args.llm})
            taken += 1
    log(f"{path}: {taken} answers taken, {len(responses.found) - taken} match no open request, {responses.failed} are failures")


def export(prompts, journal, args):
    """Write what has no answer yet as OpenAI Batch input."""
    todo = list(prompts.pending(journal, args.shard))
    save_lines(args.export_requests, (prompts.request(index).batch_line() for index in todo))
    print(f"{len(todo)} requests without an answer written to {args.export_requests}; bring the answers back with "
          "--import-responses")


def estimate(prompts, journal, args):
    """Print prompts, tokens and cost of what has no answer yet."""
    todo = list(prompts.pending(journal, args.shard))
    tokens = sum(request_tokens(prompts.request(index).body, prompts.count) for index in todo)
    known = [usage_of(answer)["completion_tokens"] for answer in journal.answered(prompts.distinct())]
    typical = float(np.mean(known)) if any(known) else min(120, args.max_tokens)
    how = "counted" if args.tokenizer or args.llm == "local" else "estimated"
    print(f"{len(prompts)} prompts, {len(todo)} without an answer: {tokens} prompt tokens ({how}), about "
          f"{typical * len(todo):.0f} and at most {args.max_tokens * len(todo)} answer tokens")
    price = [args.price_in * tokens / 1e6 + args.price_out * out * len(todo) / 1e6 for out in (typical, args.max_tokens)]
    print(f"cost: about {price[0]:.4f}, at most {price[1]:.4f}" if args.price_in or args.price_out else
          "cost: give --price-in and --price-out for an estimate")


def main(argv=None):
    args = parse_arguments(argv)
    parts = ["partition" if args.task == "partition" else "", "shard-" + args.shard.replace("/", "-of-") if args.shard else ""]
    stage = Stage("04_infer_interests", args, run="-".join(filter(None, parts)) or None)
    source = stage.input("01_preprocess")
    typical = stage.input("03_cluster_users") / "typical_users.npy" if args.users == "typical" else None
    template = PROMPTS[args.task]
    if args.prompt_file:
        template = stage.input_file(args.prompt_file, "prompt file").read_text(encoding="utf-8")
        try:
            check_template(template)
        except ValueError as error:
            raise UserError(f"--prompt-file {args.prompt_file}: {error}") from None
    if args.responses:
        stage.input_file(args.responses, "responses")
    if stage.is_done():
        return 0
    interactions, items, user_ids = load_interactions(source), load_items(source), load_user_ids(source)
    if args.llm == "recorded" and args.match == "user" and not args.allow_seen_histories and (
            args.prefix_only or interactions.kind == "leave-one-out"):
        what = "--prefix-only" if args.prefix_only else "the leave-one-out split"
        raise UserError(f"answers matched by user may have read whole histories, also what {what} holds out; results would be "
                        "too good. Use a user-level split, or --match hash, or --allow-seen-histories and say so")
    count = token_counter(args.tokenizer)
    backend = make_backend(args, items, count, stage.log.info)
    if args.llm == "local" and not args.tokenizer:
        count = backend.count
    prompts = Prompts(args, interactions, items, user_ids, typical and load_array(typical), backend.model, template, count)
    pattern = ("partition-" if args.task == "partition" else "") + "shard-*-of-*/responses.jsonl"
    shards = [] if args.shard else sorted((stage.root / "04_infer_interests").glob(pattern))
    if args.dry_run or args.export_requests:
        for _ in prompts.first_pass():
            pass
        leakage(prompts, interactions, args)
        journal = Journal(stage.folder / "responses.jsonl", shards, writable=False)
        return estimate(prompts, journal, args) if args.dry_run else export(prompts, journal, args)

    folder = stage.begin()
    save_lines(folder / "requests.jsonl", (request.batch_line() for request in prompts.first_pass()))
    report = leakage(prompts, interactions, args)
    journal = Journal(folder / "responses.jsonl", shards)
    if journal.unreadable:
        stage.log.warning(f"{journal.unreadable} unreadable lines in the journal (a run was killed while it wrote) are skipped")
    for path in args.import_responses:
        import_responses(path, prompts, journal, args, stage.log.info)
    try:
        if not (args.reparse or args.import_responses):
            ask(prompts, backend, journal, args, stage.log.info)
    except Stopped as stop:
        left = sum(1 for _ in prompts.pending(journal, args.shard))
        stage.log.error(f"stopped: {stop}. {left} of {len(prompts)} prompts have no answer; the same command goes on")
        return 3
    finally:
        backend.close()
    if args.shard:
        stage.finish({"requests": len(journal)}, outputs=["requests.jsonl", "responses.jsonl"])
        stage.log.info(f"shard {args.shard}: {len(journal)} requests finished; a run without --shard joins the shards")
        return 0
    open_ = sum(key not in journal for key in prompts.distinct())
    if open_ and not args.finish_anyway:
        stage.log.error(f"{open_} of {len(prompts)} prompts were never asked. Ask them without --import-responses and "
                        "--reparse, or give these users their titles with --finish-anyway")
        return 3
    return finish(stage, folder, prompts, journal, backend, report, args)


def finish(stage, folder, prompts, journal, backend, report, args):
    """Write the results. Returns the exit code."""
    outcomes, sources, reasons, total = Counter(), Counter(), Counter(), Counter()
    name = "groups" if args.task == "partition" else "interests"

    def rows():
        for index in range(len(prompts)):
            row = prompts.row(index, journal)
            outcomes[row["outcome"]] += 1
            sources[row["source"]] += 1
            if row["outcome"] == "failed":
                reasons[row["notes"][0].split(":")[0]] += 1
            total[name] += len(row[name])
            yield row
    save_lines(folder / f"{name}.jsonl", rows())
    save_array(folder / "seen_events.npy", np.stack([prompts.shown_start, prompts.end], axis=1).astype(np.int64))
    save_json(folder / "leakage.json", report)
    for answer in journal.answered(prompts.distinct()):
        total.update(usage_of(answer))
    usage = {"task": args.task, "llm": args.llm, "model": backend.model, "prompts": len(prompts),
             "outcomes": dict(sorted(outcomes.items())), "sources": dict(sorted(sources.items())),
             "fallback": sources["titles"], "failed_because": dict(sorted(reasons.items())),
             f"{name}_mean": total[name] / max(1, len(prompts)), **{kind: total[kind] for kind in TOKENS},
             "cost": round((total["prompt_tokens"] * args.price_in + total["completion_tokens"] * args.price_out) / 1e6, 6),
             "truncated_histories": report["truncated_histories"]}
    save_json(folder / "usage.json", usage)
    calls = getattr(backend, "counts", {})
    journal.close()
    stage.finish(usage | {"calls": calls}, outputs=["requests.jsonl", "responses.jsonl", f"{name}.jsonl", "seen_events.npy",
                                                    "leakage.json", "usage.json"])
    stage.log.info(f"{usage['prompts']} users by {args.llm} ({backend.model}): "
                   + ", ".join(f"{n} {outcome}" for outcome, n in usage["outcomes"].items())
                   + f"; {usage['fallback']} on the fallback; {usage[f'{name}_mean']:.1f} {name} a user")
    stage.log.info(f"{usage['prompt_tokens']} prompt and {usage['completion_tokens']} answer tokens, cost {usage['cost']:g}; "
                   f"{usage['truncated_histories']} histories truncated" + (f"; {calls}" if calls else ""))
    if usage["fallback"] > args.max_fallback * max(1, usage["prompts"]):
        stage.log.error(f"more than --max-fallback {args.max_fallback:g} of the users are on the fallback")
        return 4
    return 0


if __name__ == "__main__":
    artifacts.run(main)
