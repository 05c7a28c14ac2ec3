// Recurrent layers on the CPU: the arguments of a call, and the entry points. No torch, no Python. Derivation:
// README.md.
#pragma once

#include "common/native/attention_problem.hpp"

namespace linattn::recurrent {

// In the order of CELLS in contract.py.
enum class Cell : int { tanh, relu, identity, lstm };

LINATTN_INLINE constexpr Index gates(Cell cell) { return cell == Cell::lstm ? 4 : 1; }

// fp32, dense unless a stride says otherwise. G = gates(cell), in the order i, f, g, o.
struct Call {
    Cell cell = Cell::tanh;
    Index B = 0, T = 0, H = 0;
    const float* weight = nullptr;   // [G H, H]
    const Index* lengths = nullptr;  // [B], steps of each sequence; null: T
    const float* h0 = nullptr;       // [B, H]
    const float* c0 = nullptr;       // [B, H]; lstm
    float* all_h = nullptr;          // [B, T, H], 0 after a sequence's end; read by the backward pass
    float* cells = nullptr;          // [B, T, H], every c_t, likewise; null: no backward pass will follow; lstm
    float* activations = nullptr;    // [B, T, 4 H], every i, f, g, o; null with `cells`; lstm
    int threads = 1;
};

struct ForwardCall : Call {
    const float* projected = nullptr;  // [B, T, G H]
    Index stride_b = 0, stride_t = 0;
    float* last_h = nullptr;  // [B, H]
    float* last_c = nullptr;  // [B, H]; lstm
};

struct BackwardCall : Call {
    const float* dall_h = nullptr;   // [B, T, H]; null: no gradient to it
    const float* dlast_h = nullptr;  // [B, H]; or null
    const float* dlast_c = nullptr;  // [B, H]; or null
    float* dprojected = nullptr;     // [B, T, G H]
    float* dh0 = nullptr;            // [B, H]
    float* dc0 = nullptr;            // [B, H]; lstm
};

// Run on the selected instruction set. The same bits for every number of threads.
void forward(const ForwardCall& call);
void backward(const BackwardCall& call);

}  // namespace linattn::recurrent
