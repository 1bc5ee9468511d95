"""Five changes that the package must make easy, each as a program."""
