package net

// Lacks is lacks.
func (s *Spec) Lacks(d *Device) error { return s.lacks(d) }

// NewPort makes a port of a socket.
func NewPort(fd int) (Port, error) { return newPort(fd, "socket") }

const MaxFrame = maxFrame

// NewGuard is newGuard.
func NewGuard(p Policy, mac MAC) *guard { return newGuard(p, mac) }

// Owns is owns.
func (g *guard) Owns(p []byte) bool { return g.owns(p) }

// CheckSent is checkSent of a device without an MTU.
func CheckSent(p []byte, features uint64) bool { return checkSent(p, features, maxFrame) }

var MakeError = makeError
