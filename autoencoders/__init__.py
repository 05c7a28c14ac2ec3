"""linattn.autoencoders"""
