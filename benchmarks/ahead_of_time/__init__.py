"""What compilers say of programs for devices that are not at hand."""
