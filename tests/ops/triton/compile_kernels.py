"""Compiles every kernel for an H200 (sm_90), which takes no GPU; run in a process without the interpreter."""

import sys
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from torchrec_mpe.ops.bounds_check import BoundsCheckMode
from torchrec_mpe.ops.triton import (
    cache_slots,
    packed_embedding_bag,
    quantize_and_pack,
    quantize_rows,
    segment_sum,
    stored_rows,
    transformed_rows,
)

I8, I32, I64, F32, F64 = "*u8", "*i32", "*i64", "*fp32", "*fp64"


def compile_kernel(kernel: Any, types: dict[str, str], constants: dict[str, Any], **options: Any) -> None:
    """Compile with pointers aligned as torch's are; parameters without a type are int32."""
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs=aligned,
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    if options.get("enable_fp_fusion") is False:
        ptx = compiled.asm["ptx"]
        assert "fma." not in ptx and ".ftz" not in ptx and "div.full" not in ptx, f"{kernel.fn.__name__} is not exact"
    print(f"{kernel.fn.__name__} {constants}: {len(compiled.asm['cubin'])} bytes")


def lookup(
    dim: int,
    mode: BoundsCheckMode,
    ids: str = I64,
    weighted: bool = False,
    compute: Any = tl.float32,
    coded: bool = False,
) -> None:
    bytes_ = dict.fromkeys(("weights", "directory"), I8)
    wide = ("weights_offsets", "run_records", "directory_offsets", "faults", "warning", "offsets")
    narrow = ("rows_per_table", "run_starts", "run_offsets", "directory_kinds", "beta_offsets", "scale_index")
    floats = dict.fromkeys(("alpha", "beta", "zero_rows", "of_runs", "per_sample_weights"), F32)
    types = {
        **bytes_,
        **dict.fromkeys(wide, I64),
        **dict.fromkeys((*narrow, "zero_row_offsets", "bases_offsets", "components", "features"), I32),
        **floats,
        "bases": "*fp16",
        "indices": ids,
        "out": F64 if compute == tl.float64 else "*fp16",
    }
    rows, bags, lanes = packed_embedding_bag.tile_shape(dim, coded)
    constants = {
        "MODE": int(mode),
        "COUNT_WARNINGS": mode == BoundsCheckMode.WARNING,
        "WEIGHTED": weighted,
        "CODED": coded,
        "COMPUTE": compute,
        "COLUMN_MULTIPLE": 8,
        "ROWS": rows,
        "BAGS": bags,
        "LANES": lanes,
    }
    compile_kernel(
        packed_embedding_bag._lookup_kernel,
        types,
        constants,
        num_warps=1,
        maxnreg=packed_embedding_bag.max_registers(coded),
    )


def quantization(search: bool, real: str, dim: int) -> None:
    integers = dict.fromkeys(("line", "table"), I64)
    block_rows, block_dim = quantize_rows.block_shape(dim)
    for kernel in (quantize_rows._forward_kernel, quantize_rows._backward_kernel):
        constants = {
            "SEARCH": search,
            "WIDTHS": 0x6543210,
            "CANDIDATES": 7,
            "CANDIDATES_BLOCK": 8,
            "ZERO_ROWS": True,
            "BLOCK_ROWS": block_rows,
            "BLOCK_DIM": block_dim,
        }
        sizes = dict.fromkeys(("num_rows", "programs", "dim"), "i32")
        types = {**dict.fromkeys(kernel.arg_names, real), **integers, **sizes}
        compile_kernel(kernel, types, {name: constants[name] for name in constants if name in kernel.arg_names})


def cache(lfu: bool) -> None:
    wide = ("tables", "table_of_id", "table_of_slot", "positions")
    narrow = (
        "rows",
        "multiplicity",
        "slots",
        "missing_sets",
        "hit_ways",
        "sums",
        "id_sums",
        "spill_sums",
        "free_slots",
    )
    moves = ("written_slots", "written_rows", "fetched_slots", "fetched_rows")
    types = {
        **dict.fromkeys(wide, I64),
        **dict.fromkeys((*narrow, *moves), I32),
        "new_counts": I8,
        "evictions": "*i8",
    }
    for kernel in (
        cache_slots._probe_kernel,
        cache_slots._victim_kernel,
        cache_slots._empty_spill_kernel,
        cache_slots._fill_kernel,
    ):
        block = cache_slots._PROBE_BLOCK if kernel is cache_slots._probe_kernel else cache_slots._BLOCK
        constants = {"LFU": lfu, "DIRTY": 1, "BLOCK": block}
        constants = {name: constants[name] for name in constants if name in kernel.arg_names}
        compile_kernel(kernel, types, constants, num_warps=4 if "BLOCK" in constants else 1)


def rows(dim: int, stochastic: bool) -> None:
    for kernels, columns in (
        ((stored_rows._write_codes_kernel, stored_rows._read_codes_kernel), dim),
        ((stored_rows._write_state_kernel, stored_rows._read_state_kernel), 1),
    ):
        tile_rows, tile_columns = stored_rows.tile_shape(columns)
        for kernel in kernels:
            for dtype in range(3) if "DTYPE" in kernel.arg_names else (0,):
                constants = {"STOCHASTIC": stochastic, "DTYPE": dtype, "ROWS": tile_rows, "COLUMNS": tile_columns}
                constants = {name: constants[name] for name in constants if name in kernel.arg_names}
                compile_kernel(kernel, {"tables": I64}, constants, **stored_rows._OPTIONS)


def main(part: str) -> None:
    if part == "lookup":
        lookup(8, BoundsCheckMode.WARNING)
        lookup(64, BoundsCheckMode.FATAL, ids=I32, weighted=True)
        lookup(128, BoundsCheckMode.NONE)
        lookup(1024, BoundsCheckMode.IGNORE, compute=tl.float64)
        for dim in (16, 64, 256, 1024):
            lookup(dim, BoundsCheckMode.FATAL, weighted=True, coded=True)
        lookup(128, BoundsCheckMode.NONE, compute=tl.float64, coded=True)
        compile_kernel(
            transformed_rows._levels_kernel,
            {
                "run_records": I64,
                "levels": "*bf16",
                "levels_of_runs": F32,
                **dict.fromkeys(("run_offsets", "levels_offsets", "components"), I32),
            },
            {"BLOCK_RUNS": transformed_rows._BLOCK_RUNS},
        )
    elif part == "cache":
        cache(lfu=True)
        cache(lfu=False)
        rows(64, stochastic=True)
        rows(128, stochastic=False)
    else:
        quantization(True, F32, 16)
        quantization(False, F64, 128)
        for bits in (3, 8):
            compile_kernel(
                quantize_and_pack._pack_kernel,
                {"rows": F32, "alpha": F32, "beta": F32, "packed": I8},
                {"BITS": bits, "BLOCKS": 256},
            )
        compile_kernel(
            segment_sum._segment_sum_kernel,
            {"values": F32, "weight": F32, "order": I64, "bounds": I64, "partial": F32},
            {"WEIGHTED": True, "BLOCK_ROWS": 64, "BLOCK_COLUMNS": 8},
        )


if __name__ == "__main__":
    main(sys.argv[1])
