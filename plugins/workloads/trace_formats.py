"""Public traces of requests that stand alone, a function each: lines of a file to rows."""

from __future__ import annotations

from collections.abc import Iterator

from headway import served_requests

from .lines import Lines, Malformed, json_object
from .numbers import count, seconds
from .trace_rows import Row, Source, block_ids, csv_table, moment, required

MOONCAKE_BLOCK = 512  # tokens a hash id stands for
MOONCAKE_KEYS = ("timestamp", "input_length", "output_length", "hash_ids")
AZURE_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
VLLM_BENCH_KEYS = ("request_throughput", "total_input_tokens")
BURSTGPT_COLUMNS = ("Timestamp", "Request tokens", "Response tokens")


def azure(lines: Lines, source: Source) -> Iterator[Row]:
    """Azure LLM inference trace: TIMESTAMP, ContextTokens, GeneratedTokens. No identity of prompts, so no
    reuse.

    Times are those of 2023 (no zone) or of 2024 (a zone each); a file has one kind or the other.
    """
    zoned: bool | None = None
    for number, (when, context, generated) in csv_table(lines, *AZURE_COLUMNS):
        time, zone = moment(number, "TIMESTAMP", when)
        zoned = zone if zoned is None else zoned
        if zone != zoned:
            has = "a" if zone else "no"
            raise Malformed(number, f"TIMESTAMP {when!r} has {has} time zone, unlike the lines before it")
        yield Row(time, count(number, "ContextTokens", context), count(number, "GeneratedTokens", generated))


def burstgpt(lines: Lines, source: Source) -> Iterator[Row]:
    """BurstGPT: Timestamp (seconds), Request tokens, Response tokens, among other columns. No identity of
    prompts.

    A request that failed there has 0 response tokens; the engine rejects it.
    """
    for number, (time, request, response) in csv_table(lines, *BURSTGPT_COLUMNS):
        lengths = count(number, "Request tokens", request), count(number, "Response tokens", response)
        yield Row(seconds(number, "Timestamp", time), *lengths)


def mooncake(lines: Lines, source: Source) -> Iterator[Row]:
    """Mooncake JSONL: timestamp (ms), input_length, output_length, hash_ids of 512-token prefix blocks, the
    last one partial."""
    for number, text in lines:
        entry = json_object(number, text)
        required(number, entry, MOONCAKE_KEYS)
        length = count(number, "input_length", entry["input_length"])
        ids = block_ids(number, "hash_ids", entry["hash_ids"], length, size=MOONCAKE_BLOCK)
        time = seconds(number, "timestamp", entry["timestamp"], 1000)
        yield Row(time, length, count(number, "output_length", entry["output_length"]), ids, MOONCAKE_BLOCK)


def vllm_bench(lines: Lines, source: Source) -> Iterator[Row]:
    """What `vllm bench serve --save-result --save-detailed` wrote: the requests that were answered. No
    identity of prompts."""
    for number, text in lines:
        try:
            requests = served_requests(json_object(number, text))
        except ValueError as error:
            raise error if isinstance(error, Malformed) else Malformed(number, str(error)) from None
        for request in requests:
            yield Row(request.time, request.input_len, request.output_len)
