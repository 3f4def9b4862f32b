// AMX: products of 16 rows of signed codes with 16 outputs of unsigned ones, 64 columns at a time, in tiles of 1 KiB.
//
// Whether the processor has AMX, and the system lets this process use it, is probed at run time: a library for
// AVX512-BF16, which every processor with AMX has, uses it where it is. The sums are the same integers as without.
// OPTC_AMX_IN_SOFTWARE builds the tiles in plain C++, for tests on other processors, and counts their products.
#pragma once

#include "panel.h"

#if defined(OPTC_AMX_IN_SOFTWARE)
#include <atomic>
#elif defined(__AVX512BF16__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace optc::amx {

constexpr int kTileRows = 16, kTileBytes = 64;
constexpr int kBlock = 2 * kTileRows;  // rows of x that meet a panel together: four tiles of sums, two of x, two of the panel

// The shapes of the eight tiles, as the processor takes them.
struct alignas(64) Shapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums, [16 rows][16 outputs]: those of rows 0-15 with outputs 0-15 and 16-31, and those of rows 16-31.
// 4 and 5 hold x, [16 rows][step]; 6 and 7 the panel's halves, [step / 4 runs][16 outputs][4].
inline Shapes shapes(int64_t step) {
  Shapes found;
  for (int tile = 0; tile < 8; tile++) {
    const bool is_x = tile == 4 || tile == 5, is_panel = tile >= 6;
    found.row_bytes[tile] = is_x ? static_cast<uint16_t>(step) : kTileBytes;
    found.rows[tile] = is_panel ? static_cast<uint8_t>(step / 4) : kTileRows;
  }
  return found;
}

// Columns of a unit that meet at a time; 0 if a unit's columns cannot be cut so.
inline int64_t step_of(int64_t unit, int64_t columns) {
  for (int64_t step = kTileBytes; step >= 16; step -= 4)
    if (unit % step == 0 && columns % unit % step == 0) return step;
  return 0;
}

#if defined(OPTC_AMX_IN_SOFTWARE)

struct Tiles {
  Shapes shapes;
  uint8_t data[8][kTileRows][kTileBytes];
};
inline thread_local Tiles tiles;
inline std::atomic<int64_t> products{0};

inline bool available() { return true; }
inline void begin(const Shapes& shapes) { tiles.shapes = shapes; }
inline void end() { tiles.shapes = Shapes(); }

inline void zero(int tile) { std::memset(tiles.data[tile], 0, sizeof tiles.data[tile]); }

inline void load(int tile, const void* from, int64_t stride) {
  for (int row = 0; row < tiles.shapes.rows[tile]; row++)
    std::memcpy(tiles.data[tile][row], static_cast<const char*>(from) + row * stride, tiles.shapes.row_bytes[tile]);
}

inline void store(int tile, void* to, int64_t stride) {
  for (int row = 0; row < tiles.shapes.rows[tile]; row++)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles.data[tile][row], tiles.shapes.row_bytes[tile]);
}

inline void multiply(int sums, int x, int panel) {
  products++;
  for (int row = 0; row < tiles.shapes.rows[sums]; row++)
    for (int output = 0; output < tiles.shapes.row_bytes[sums] / 4; output++) {
      int32_t sum;
      uint8_t* place = tiles.data[sums][row] + 4 * output;
      std::memcpy(&sum, place, sizeof sum);
      for (int k = 0; k < tiles.shapes.row_bytes[x]; k++)
        sum += static_cast<int8_t>(tiles.data[x][row][k]) * tiles.data[panel][k / 4][4 * output + k % 4];
      std::memcpy(place, &sum, sizeof sum);
    }
}

// For tests, which see by it whether tiles were reached.
extern "C" __attribute__((visibility("default"), used)) inline int64_t optc_tile_products() { return products; }

#define OPTC_TILES
#define OPTC_TILE_ZERO zero
#define OPTC_TILE_LOAD load
#define OPTC_TILE_STORE store
#define OPTC_TILE_MULTIPLY multiply

#elif defined(__AVX512BF16__)

#define OPTC_TILES __attribute__((target("amx-tile,amx-int8")))
#define OPTC_TILE_ZERO _tile_zero
#define OPTC_TILE_LOAD _tile_loadd
#define OPTC_TILE_STORE(tile, to, stride) _tile_stored(tile, to, stride)
#define OPTC_TILE_MULTIPLY _tile_dpbsud

// CPUID leaf 7: AMX-TILE and AMX-INT8. Linux gives a process the tiles' state when it asks.
inline bool available() {
  static const bool found = [] {
    constexpr unsigned kTile = 1u << 24, kInt8 = 1u << 25;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d & kTile) || !(d & kInt8)) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return found;
}

OPTC_TILES inline void begin(const Shapes& shapes) {
  asm volatile("" : : "r"(&shapes) : "memory");  // GCC's header says that only the first bytes are read
  _tile_loadconfig(&shapes);
}
OPTC_TILES inline void end() { _tile_release(); }

#endif

#if defined(OPTC_TILES)

// sums[rows, 32] = the products of 16 rows of x, or of 32 if there are more than 16, with `columns` columns of a panel of bytes.
OPTC_TILES inline void unit(const uint8_t* w, const int8_t* x, int64_t stride, int64_t rows, int64_t columns, int64_t step,
                            int32_t* sums) {
  constexpr int64_t kSumsBytes = 4 * kPanel;
  const bool both = rows > kTileRows;
  asm volatile("" ::: "memory");  // GCC's loads of tiles do not say that they read memory
  OPTC_TILE_ZERO(0);
  OPTC_TILE_ZERO(1);
  OPTC_TILE_ZERO(2);
  OPTC_TILE_ZERO(3);
  for (int64_t k = 0; k < columns; k += step) {
    OPTC_TILE_LOAD(6, w + k * kPanel, 4 * kPanel);
    OPTC_TILE_LOAD(7, w + k * kPanel + 4 * kHalf, 4 * kPanel);
    OPTC_TILE_LOAD(4, x + k, stride);
    OPTC_TILE_MULTIPLY(0, 4, 6);
    OPTC_TILE_MULTIPLY(1, 4, 7);
    if (!both) continue;
    OPTC_TILE_LOAD(5, x + kTileRows * stride + k, stride);
    OPTC_TILE_MULTIPLY(2, 5, 6);
    OPTC_TILE_MULTIPLY(3, 5, 7);
  }
  OPTC_TILE_STORE(0, sums, kSumsBytes);
  OPTC_TILE_STORE(1, sums + kHalf, kSumsBytes);
  if (!both) return;
  OPTC_TILE_STORE(2, sums + kTileRows * kPanel, kSumsBytes);
  OPTC_TILE_STORE(3, sums + kTileRows * kPanel + kHalf, kSumsBytes);
}

#else

inline bool available() { return false; }

#endif

}  // namespace optc::amx
