// The splits of a wavelet directory, checked.
#pragma once

#include "packed_tables.h"

namespace torchrec_mpe {

// Takes the splits of a wavelet directory of so many lines; returns whether all that they lead to lies in it.
inline bool take_splits(PackedTable& table, int64_t all_lines) {
  const auto inside = [&](int64_t line, int64_t rows, int64_t rows_a_line) {
    return 0 < line && line <= all_lines && (rows + rows_a_line - 1) / rows_a_line <= all_lines - line;
  };
  table.splits = reinterpret_cast<const Split*>(table.directory);
  const int64_t count = table.splits->splits;
  bool sound = 1 <= count && count <= kMaxSplits && table.splits->rows == table.num_rows &&
               count * static_cast<int64_t>(sizeof(Split)) <= all_lines * kLineBytes;
  for (int64_t k = 0; sound && k < count; ++k) {
    const Split& split = table.splits[k];
    const auto leads_on = [&](int32_t there, int32_t rows) {
      return there > 0 ? k < there && there < count && table.splits[there].rows == rows
                       : there == 0 || inside(-int64_t{there}, rows, kLineBytes / 4);
    };
    sound = 0 <= split.kept && split.kept <= split.rows && 0 <= split.first &&
            int64_t{split.first} + split.rows <= table.num_rows && inside(split.line, split.rows, kBitmapRows) &&
            leads_on(split.set, split.kept) && leads_on(split.rest, split.rows - split.kept);
  }
  return sound;
}

}  // namespace torchrec_mpe
