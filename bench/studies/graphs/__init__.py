"""Studies of graphs: convolution and attention between neighbours."""
