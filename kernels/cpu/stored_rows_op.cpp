// torch.ops.torchrec_mpe.write_stored_rows_ and read_stored_rows_: torchrec_mpe/ops/stored_rows.py says what they do.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>
#include <string>
#include <vector>

#include "stored_rows.h"

namespace torchrec_mpe {
namespace {

using at::Tensor;
using at::TensorList;

constexpr int64_t kMovesOfAPiece = 256;

void check_tensor(const Tensor& tensor, int64_t table, const char* name, at::ScalarType dtype, int64_t dims) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, "table ", table, ": ", name, " must be ", dtype, ", got ",
                   tensor.scalar_type());
  TORCH_CHECK_VALUE(tensor.device().is_cpu() && tensor.dim() == dims && tensor.is_contiguous(), "table ", table, ": ",
                    name, " must be contiguous, on the CPU and of ", dims, " dimensions, got ", tensor.sizes(), " on ",
                    tensor.device());
}

StateType state_type(c10::string_view name) {
  TORCH_CHECK_VALUE(name == "fp32" || name == "bf16" || name == "ue6m2", "a state cannot be stored as ", name);
  return name == "fp32" ? StateType::Float : name == "bf16" ? StateType::BFloat16 : StateType::Ue6m2;
}

int64_t bytes_of(StateType type) {
  return type == StateType::Float ? 4 : type == StateType::BFloat16 ? 2 : 1;
}

// The tables' tensors, all of them checked, and the views of them that the kernels use.
class Tables {
 public:
  Tables(TensorList rows4, TensorList rows8, TensorList is_wide, TensorList wide_before, TensorList values,
         TensorList states, at::IntArrayRef states_per_table, TensorList slots, TensorList rows,
         const std::vector<std::string>& state_dtypes)
      : size_(static_cast<int64_t>(rows4.size())) {
    for (const size_t size : {rows8.size(), is_wide.size(), wide_before.size(), values.size(), states_per_table.size(),
                              slots.size(), rows.size()}) {
      TORCH_CHECK_VALUE(size == rows4.size(), "stores, values, states and moves must be of equally many tables");
    }
    states_.reserve(states.size());
    first_move_.push_back(0);
    size_t next_state = 0;
    for (int64_t t = 0; t < size_; ++t) {
      check_tensor(rows4[t], t, "rows4", at::kByte, 2);
      check_tensor(rows8[t], t, "rows8", at::kByte, 2);
      check_tensor(is_wide[t], t, "is_wide", at::kLong, 1);
      check_tensor(wide_before[t], t, "wide_before", at::kInt, 1);
      check_tensor(values[t], t, "values", at::kFloat, 2);
      check_tensor(slots[t], t, "slots", at::kInt, 1);
      check_tensor(rows[t], t, "rows", at::kInt, 1);
      StoredRows table{};
      table.rows4 = rows4[t].data_ptr<uint8_t>();
      table.rows8 = rows8[t].data_ptr<uint8_t>();
      table.n4 = rows4[t].size(0);
      table.n8 = rows8[t].size(0);
      table.row_bytes4 = rows4[t].size(1);
      table.row_bytes8 = rows8[t].size(1);
      table.values = values[t].data_ptr<float>();
      table.dim = values[t].size(1);
      table.slots = slots[t].const_data_ptr<int32_t>();
      table.rows = rows[t].const_data_ptr<int32_t>();
      TORCH_CHECK_VALUE(table.dim > 0 && table.dim % 2 == 0, "table ", t, ": it has ", table.dim,
                        " columns, which must be even");
      if (is_wide[t].numel() > 0) {
        const int64_t words = (table.n4 + table.n8 + 63) / 64;
        TORCH_CHECK_VALUE(is_wide[t].numel() == words && wide_before[t].numel() == words, "table ", t, ": is_wide has ",
                          is_wide[t].numel(), " words and wide_before ", wide_before[t].numel(), ", not ", words);
        table.is_wide = is_wide[t].const_data_ptr<int64_t>();
        table.wide_before = wide_before[t].const_data_ptr<int32_t>();
      } else {
        TORCH_CHECK_VALUE(table.n4 == 0 || table.n8 == 0, "table ", t, ": is_wide is needed for rows of both widths");
      }
      const int64_t here = states_per_table[t];
      TORCH_CHECK_VALUE(here == 0 || here == static_cast<int64_t>(state_dtypes.size()), "table ", t, ": it has ", here,
                        " states, there are ", state_dtypes.size(), " state_dtypes");
      TORCH_CHECK_VALUE(next_state + here <= states.size(), "fewer states than the tables have");
      table.states = states_.data() + states_.size();
      table.num_states = here;
      int64_t state_bytes = 0;
      for (int64_t s = 0; s < here; ++s) {
        const Tensor& state = states[next_state++];
        check_tensor(state, t, "a state", at::kFloat, 2);
        TORCH_CHECK_VALUE(state.size(0) == values[t].size(0), "table ", t, ": a state has ", state.size(0),
                          " slots, values ", values[t].size(0));
        const CachedState cached{state.data_ptr<float>(), state.size(1), state_type(state_dtypes[s])};
        state_bytes += cached.elements * bytes_of(cached.type);
        states_.push_back(cached);
      }
      for (const int64_t bits : {4, 8}) {
        const int64_t bytes = bits == 4 ? table.row_bytes4 : table.row_bytes8;
        const int64_t needed = table.dim * bits / 8 + 2 + state_bytes;
        const int64_t held = bits == 4 ? table.n4 : table.n8;
        // Without states here the store may hold some.
        TORCH_CHECK_VALUE(held == 0 || (here > 0 ? bytes == needed : bytes >= needed), "table ", t, ": its ", bits,
                          "-bit rows have ", bytes, " bytes, not ", needed);
      }
      check_moves(table, t, values[t].size(0), slots[t].numel(), rows[t].numel());
      tables_.push_back(table);
      first_move_.push_back(first_move_.back() + rows[t].numel());
    }
    TORCH_CHECK_VALUE(next_state == states.size(), "more states than the tables have");
  }

  int64_t size() const {
    return size_;
  }

  // Calls move(table, first, last) for all moves of all tables, on several threads.
  template <typename Move>
  void for_each_move(const Move& move) const {
    at::parallel_for(0, first_move_.back(), kMovesOfAPiece, [&](int64_t begin, int64_t end) {
      int64_t t = std::upper_bound(first_move_.begin(), first_move_.end(), begin) - first_move_.begin() - 1;
      for (; begin < end; ++t) {
        const int64_t last = std::min(end, first_move_[t + 1]);
        if (begin < last) {
          move(t, tables_[t], begin - first_move_[t], last - first_move_[t]);
        }
        begin = last;
      }
    });
  }

 private:
  static void check_moves(const StoredRows& table, int64_t t, int64_t num_slots, int64_t n, int64_t num_rows_moved) {
    TORCH_CHECK_VALUE(n == num_rows_moved, "table ", t, ": its moves are of ", n, " slots and ", num_rows_moved,
                      " rows");
    const int64_t num_rows = table.n4 + table.n8;
    for (int64_t i = 0; i < n; ++i) {
      TORCH_CHECK_INDEX(table.slots[i] >= 0 && table.slots[i] < num_slots, "table ", t, " has ", num_slots,
                        " slots, got the slot ", table.slots[i]);
      TORCH_CHECK_INDEX(table.rows[i] >= 0 && table.rows[i] < num_rows, "table ", t, " has ", num_rows,
                        " rows, got the row ", table.rows[i]);
      if (table.is_wide != nullptr) {
        const StoredPlace place = place_of(table, table.rows[i]);
        TORCH_CHECK_VALUE(place.index >= 0 && place.index < (place.wide ? table.n8 : table.n4), "table ", t,
                          ": is_wide and wide_before place row ", table.rows[i], " outside");
      }
    }
  }

  int64_t size_;
  std::vector<StoredRows> tables_;
  std::vector<CachedState> states_;  // of all tables
  std::vector<int64_t> first_move_;  // of each table among all; the last is their number
};

void write_stored_rows_(TensorList rows4, TensorList rows8, TensorList is_wide, TensorList wide_before,
                        TensorList values, TensorList states, at::IntArrayRef states_per_table, TensorList slots,
                        TensorList rows, std::vector<std::string> state_dtypes, int64_t batch, at::IntArrayRef seeds,
                        at::IntArrayRef first_rows, at::IntArrayRef first_columns, bool stochastic_rounding) {
  const Tables tables(rows4, rows8, is_wide, wide_before, values, states, states_per_table, slots, rows, state_dtypes);
  std::vector<Rounding> roundings;
  for (const at::IntArrayRef& numbers : {seeds, first_rows, first_columns}) {
    TORCH_CHECK_VALUE(static_cast<int64_t>(numbers.size()) == tables.size(), "there are ", tables.size(),
                      " tables, but ", seeds.size(), " seeds, ", first_rows.size(), " first rows and ",
                      first_columns.size(), " first columns");
  }
  for (int64_t t = 0; t < tables.size(); ++t) {
    roundings.push_back({stochastic_rounding, static_cast<uint32_t>(batch), static_cast<uint64_t>(seeds[t]),
                         first_rows[t], first_columns[t]});
  }
  const WriteRows write = TORCHREC_MPE_OF_THIS_CPU(write_stored_rows);
  tables.for_each_move([&](int64_t t, const StoredRows& table, int64_t first, int64_t last) {
    write(table, roundings[t], first, last);
  });
}

void read_stored_rows_(TensorList rows4, TensorList rows8, TensorList is_wide, TensorList wide_before,
                       TensorList values, TensorList states, at::IntArrayRef states_per_table, TensorList slots,
                       TensorList rows, std::vector<std::string> state_dtypes) {
  const Tables tables(rows4, rows8, is_wide, wide_before, values, states, states_per_table, slots, rows, state_dtypes);
  const ReadRows read = TORCHREC_MPE_OF_THIS_CPU(read_stored_rows);
  tables.for_each_move(
      [&](int64_t, const StoredRows& table, int64_t first, int64_t last) { read(table, first, last); });
}

}  // namespace
}  // namespace torchrec_mpe

TORCH_LIBRARY_FRAGMENT(torchrec_mpe, m) {
  m.def(
      "write_stored_rows_(Tensor(a!)[] rows4, Tensor(b!)[] rows8, Tensor[] is_wide, Tensor[] wide_before, "
      "Tensor[] values, Tensor[] states, int[] states_per_table, Tensor[] slots, Tensor[] rows, str[] state_dtypes, "
      "int batch, int[] seeds, int[] first_rows, int[] first_columns, bool stochastic_rounding) -> ()");
  m.def(
      "read_stored_rows_(Tensor[] rows4, Tensor[] rows8, Tensor[] is_wide, Tensor[] wide_before, "
      "Tensor(a!)[] values, Tensor(b!)[] states, int[] states_per_table, Tensor[] slots, Tensor[] rows, "
      "str[] state_dtypes) -> ()");
}

TORCH_LIBRARY_IMPL(torchrec_mpe, CPU, m) {
  m.impl("write_stored_rows_", torchrec_mpe::write_stored_rows_);
  m.impl("read_stored_rows_", torchrec_mpe::read_stored_rows_);
}
