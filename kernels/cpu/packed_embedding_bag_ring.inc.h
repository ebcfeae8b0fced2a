// The rows that a lookup has in flight. Included inside an instruction set's namespace, see the driver.

constexpr int kBlock = 32;              // rows that a step handles at a time, and how far ahead rows are fetched
constexpr int kRing = 8 * kBlock;       // slots of the ring
constexpr int kSegment = 4 * kBlock;    // rows of a bag that are added at a time; blocks ahead of them fit as well
constexpr int32_t kPruned = -1;         // ranks of rows that add nothing
constexpr int32_t kZeroBits = -2;       // and of 0-bit rows that a bitmap leaves out

// A slot per row; row i of a feature is in slot i % kRing.
struct Ring {
  alignas(64) int64_t start[kRing];     // byte of the table where reading the row starts
  alignas(64) int64_t last[kRing];      // and the last byte that is read
  alignas(64) int32_t rank[kRing];
  alignas(64) int32_t bits[kRing];
  alignas(64) int32_t position[kRing];  // of the row in what is read, as the accumulator wants it
  alignas(64) float scale[kRing];       // weight * step size of a plain row of more than 0 bits, or 0
  alignas(64) float kept[kRing];        // weight of a row of more than 0 bits, or 0
  alignas(64) float zero[kRing];        // weight of a 0-bit row, or 0
  // Of rows of tables that have transformed ones:
  alignas(64) int32_t run[kRing];       // of a transformed row, as the decoder wants it; see CheckedRuns::none()
  alignas(64) int32_t shift[kRing];     // of a transformed row in its first byte, as the decoder wants it
  alignas(64) float weight[kRing];      // of a transformed row, or 0
};

// What locating a block of rows met.
struct Located {
  bool damaged;  // a row outside the weights, now one of 0 bits
  bool mixed;    // a row whose kept is not 1 or whose zero is not 0
};

// The kinds of rows of more than 0 bits that a table has.
enum class Kinds { Plain, Transformed, Both };

// What is read of every transformed row of a table: a word of 64 bits, or more.
enum class Span { Word, Bytes };

// What is known of all plain rows of a table, for an accumulator that makes use of it.
enum class Rows {
  Any,
  Narrow,        // 7 bits at most, or 16 elements at most
  NarrowInLine,  // the same, and no group of 64 elements crosses a line of 64 bytes
  Bytes,         // 8 bits
};
