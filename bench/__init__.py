"""linattn.bench"""
