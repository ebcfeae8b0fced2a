// torch.ops.torchrec_mpe.assign_cache_slots_: torchrec_mpe/ops/cache_slots.py says what it does.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "cache_slots.h"

namespace torchrec_mpe {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kStatistics = 6;

void check_tensor(const Tensor& tensor, int64_t table, const char* name, at::ScalarType dtype, int64_t length) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "table ", table, ": ", name, " must be ", dtype, ", got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.dim() == 1 && tensor.is_contiguous() && tensor.size(0) == length,
                    "table ", table, ": ", name, " must be [", length, "], contiguous and on the CPU, got ",
                    tensor.sizes(), " on ", tensor.device());
}

struct Directories {
  TensorList slot_rows, slot_batches, slot_dirty, slot_counts, row_counts, statistics;

  CachedTable table(int64_t t, int64_t num_rows, int64_t sets) const {
    const int64_t slots = slot_rows[t].numel();
    TORCH_CHECK_VALUE(num_rows >= 0 && num_rows <= INT32_MAX, "table ", t, " has ", num_rows, " rows");
    TORCH_CHECK_VALUE(sets >= 1 && sets <= slots / kWays && slots <= INT32_MAX, "table ", t, " has ", sets,
                      " sets of ", kWays, " slots, but ", slots, " slots");
    const bool lfu = row_counts[t].numel() > 0;
    check_tensor(slot_rows[t], t, "slot_rows", at::kInt, slots);
    check_tensor(slot_batches[t], t, "slot_batches", at::kInt, slots);
    check_tensor(slot_dirty[t], t, "slot_dirty", at::kByte, slots);
    check_tensor(slot_counts[t], t, "slot_counts", at::kByte, lfu ? slots : 0);
    check_tensor(row_counts[t], t, "row_counts", at::kByte, lfu ? num_rows : 0);
    check_tensor(statistics[t], t, "statistics", at::kLong, kStatistics);
    CachedTable table{};
    table.slot_rows = slot_rows[t].data_ptr<int32_t>();
    table.slot_batches = slot_batches[t].data_ptr<int32_t>();
    table.slot_dirty = slot_dirty[t].data_ptr<uint8_t>();
    table.slot_counts = lfu ? slot_counts[t].data_ptr<uint8_t>() : nullptr;
    table.row_counts = lfu ? row_counts[t].data_ptr<uint8_t>() : nullptr;
    table.statistics = statistics[t].data_ptr<int64_t>();
    table.slots = slots;
    table.sets = sets;
    table.num_rows = num_rows;
    return table;
  }
};

// The first id of a table that is no row of it, or -1.
template <typename index_t>
int64_t first_bad(const index_t* ids, int64_t n, int64_t num_rows) {
  bool bad = false;
  for (int64_t i = 0; i < n; ++i) {
    bad |= (ids[i] < 0) | (ids[i] > num_rows - 1);
  }
  for (int64_t i = 0; bad && i < n; ++i) {
    if (ids[i] < 0 || ids[i] >= num_rows) {
      return i;
    }
  }
  return -1;
}

// The directories' moves: four tensors a table.
std::vector<Tensor> moves_of(const std::vector<Assignment>& assignments) {
  std::vector<Tensor> moves;
  for (const Assignment& assignment : assignments) {
    const int64_t written = assignment.num_written, fetched = static_cast<int64_t>(assignment.misses.size());
    int32_t* to[4];
    for (int k = 0; k < 4; ++k) {
      moves.push_back(at::empty({k < 2 ? written : fetched}, at::kInt));
      to[k] = moves.back().data_ptr<int32_t>();
    }
    list_moves(assignment, to[0], to[1], to[2], to[3]);
  }
  return moves;
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<int64_t>> assign_cache_slots_(
    TensorList slot_rows, TensorList slot_batches, TensorList slot_dirty, TensorList slot_counts, TensorList row_counts,
    TensorList statistics, const Tensor& ids, at::IntArrayRef ids_per_table, at::IntArrayRef num_rows,
    at::IntArrayRef num_sets, at::IntArrayRef first_rows, at::IntArrayRef seeds, int64_t batch,
    int64_t oldest_in_flight, bool dirty) {
  const auto tables = static_cast<int64_t>(slot_rows.size());
  for (const size_t size :
       {slot_batches.size(), slot_dirty.size(), slot_counts.size(), row_counts.size(), statistics.size(),
        ids_per_table.size(), num_rows.size(), num_sets.size(), first_rows.size(), seeds.size()}) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(size) == tables, "there are ", tables, " tables, and arguments of ", size);
  }
  TORCH_CHECK_VALUE(0 <= oldest_in_flight && oldest_in_flight <= batch && batch <= INT32_MAX, "batch ", batch,
                    " and the oldest in flight ", oldest_in_flight, " must be in order, from 0 to 2^31 - 1");
  TORCH_CHECK_VALUE(ids.dim() == 1 && ids.device().is_cpu(), "ids must be [N] and on the CPU, got ", ids.sizes(),
                    " on ", ids.device());
  const Directories directories{slot_rows, slot_batches, slot_dirty, slot_counts, row_counts, statistics};
  std::vector<Assignment> assignments(tables);
  std::vector<int64_t> start(tables + 1, 0);
  for (int64_t t = 0; t < tables; ++t) {
    CachedTable table = directories.table(t, num_rows[t], num_sets[t]);
    table.first_row = first_rows[t];
    table.seed = static_cast<uint64_t>(seeds[t]);
    table.batch = static_cast<int32_t>(batch);
    table.oldest_in_flight = static_cast<int32_t>(oldest_in_flight);
    assignments[t].table = table;
    TORCH_CHECK_VALUE(ids_per_table[t] >= 0 && ids_per_table[t] <= std::min<int64_t>(ids.size(0) - start[t], INT32_MAX),
                      "table ", t, " has ", ids_per_table[t], " ids, more than are left");
    start[t + 1] = start[t] + ids_per_table[t];
  }
  TORCH_CHECK_VALUE(start[tables] == ids.size(0), "the tables have ", start[tables], " of ", ids.size(0), " ids");
  const Tensor contiguous = ids.contiguous();
  const Tensor locations = at::empty_like(contiguous);
  AT_DISPATCH_INDEX_TYPES(ids.scalar_type(), "assign_cache_slots_", [&] {
    const index_t* from = contiguous.const_data_ptr<index_t>();
    index_t* to = locations.data_ptr<index_t>();
    std::vector<int64_t> bad(tables);
    at::parallel_for(0, tables, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        bad[t] = first_bad(from + start[t], ids_per_table[t], num_rows[t]);
      }
    });
    for (int64_t t = 0; t < tables; ++t) {
      TORCH_CHECK_INDEX(bad[t] < 0, "table ", t, " has ", num_rows[t], " rows, got the id ", from[start[t] + bad[t]]);
    }
    const AssignSlots<index_t> assign = TORCHREC_MPE_OF_THIS_CPU(assign_slots<index_t>);
    at::parallel_for(0, tables, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        assign(assignments[t], from + start[t], ids_per_table[t], to + start[t]);
      }
    });
  });
  std::vector<int64_t> needed;
  bool fits = true;
  const Assignment* bad = nullptr;
  for (const Assignment& assignment : assignments) {
    needed.push_back(assignment.needed_spill);
    fits = fits && assignment.needed_spill <= assignment.table.slots - assignment.table.first_spill();
    bad = bad == nullptr && assignment.bad_slot >= 0 ? &assignment : bad;
  }
  if (!fits || bad != nullptr) {
    for (const Assignment& assignment : assignments) {
      undo(assignment);
    }
    TORCH_CHECK_VALUE(bad == nullptr, "table ", bad - assignments.data(), " has ", bad->table.num_rows,
                      " rows, but its slot ", bad->bad_slot, " the row ", bad->table.slot_rows[bad->bad_slot]);
    return {locations.narrow(0, 0, 0), std::vector<Tensor>{}, needed};
  }
  at::parallel_for(0, tables, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      commit(assignments[t], dirty);
    }
  });
  return {locations, moves_of(assignments), needed};
}

}  // namespace
}  // namespace torchrec_mpe

TORCH_LIBRARY_FRAGMENT(torchrec_mpe, m) {
  m.def(
      "assign_cache_slots_(Tensor(a!)[] slot_rows, Tensor(b!)[] slot_batches, Tensor(c!)[] slot_dirty, "
      "Tensor(d!)[] slot_counts, Tensor(e!)[] row_counts, Tensor(f!)[] statistics, Tensor ids, int[] ids_per_table, "
      "int[] num_rows, int[] num_sets, int[] first_rows, int[] seeds, int batch, int oldest_in_flight, bool dirty) "
      "-> (Tensor, Tensor[], int[])");
}

TORCH_LIBRARY_IMPL(torchrec_mpe, CPU, m) {
  m.impl("assign_cache_slots_", torchrec_mpe::assign_cache_slots_);
}
