package net

// NewPort makes a port of a socket.
func NewPort(fd int) (Port, error) { return newPort(fd, "socket") }

const MaxFrame = maxFrame
