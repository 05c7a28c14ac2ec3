// A call that breaks a precondition ends where it enters, with a message that names the place (LINATTN_CHECKED).
#include <csignal>
#include <cstdlib>
#include <vector>

#include "quadratic/native/quadratic.hpp"

int main() {
    std::vector<float> numbers(64);
    linattn::quadratic::ForwardCall call;
    linattn::AttentionProblem& p = call.problem;
    p.B = p.sequences = p.Tq = p.Tk = p.D = p.M = 1;
    p.H = 3, p.Hkv = 2;  // no multiple
    p.q = p.k = p.v = call.out = {numbers.data(), 3, 1, 1};
    call.l = numbers.data();
    std::signal(SIGABRT, [](int) { std::_Exit(0); });
    linattn::quadratic::forward(call);
    return 1;
}
