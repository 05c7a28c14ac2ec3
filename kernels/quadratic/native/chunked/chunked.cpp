#include "quadratic/native/chunked/chunked.hpp"

#include "quadratic/native/chunked/chunked_pass.hpp"

namespace linattn::LINATTN_ISA::quadratic {

void chunked_forward(const ForwardCall& call) {
    const AttentionProblem& p = call.problem;
    run_in_teams(p.threads, p.sequences * p.Hkv, [&](Index task, Team& team) {
        QueryPass(QueryPass::Kind::output, call, call.after, nullptr, task / p.Hkv, task % p.Hkv, team).run();
    });
}

void chunked_backward(const BackwardCall& call) {
    const AttentionProblem& p = call.problem;
    const bool queries = call.dq.data != nullptr;
    const bool keys = call.dk.data != nullptr || call.dv.data != nullptr || call.dbefore != nullptr;
    const Index heads = p.sequences * p.Hkv;
    // The pass for keys does more: begin with it.
    run_in_teams(p.threads, heads * (queries + keys), [&](Index task, Team& team) {
        const Index head = task % heads;
        if (keys && task < heads)
            KeyPass(call, head / p.Hkv, head % p.Hkv, team).run();
        else
            QueryPass(QueryPass::Kind::gradient, call, nullptr, &call, head / p.Hkv, head % p.Hkv, team).run();
    });
}

void final_state(const ForwardCall& call) {
    const AttentionProblem& p = call.problem;
    run_in_teams(p.threads, p.sequences * p.Hkv, [&](Index task, Team& team) {
        QueryPass(QueryPass::Kind::state, call, call.after, nullptr, task / p.Hkv, task % p.Hkv, team).run();
    });
}

}  // namespace linattn::LINATTN_ISA::quadratic
