"""What a request needs: phases, operators and memory, traced without loading a weight."""
