"""linattn.rnn"""
