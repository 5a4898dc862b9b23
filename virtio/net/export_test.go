package net

// Lacks is lacks.
func (s *Spec) Lacks(d *Device) error { return s.lacks(d) }

// NewPort makes a port of a socket.
func NewPort(fd int) (Port, error) { return newPort(fd, "socket") }

const MaxFrame = maxFrame
