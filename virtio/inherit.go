package virtio

import (
	"log/slog"
	"os"
)

// Inheritable is a [Backend] whose descriptors another process of this host can go on with,
// when it takes over the guest: what the device holds then never has nobody to hold it, and
// the other process need not be able to open it. See [Heir].
type Inheritable interface {
	// Descriptors are those of the backend, for [Heir].Inherit. They stay the backend's;
	// what they stand for is shared as soon as they are duplicated. It fails if the
	// backend is in a state that another process cannot go on with.
	Descriptors() ([]uintptr, error)
}

// Heir is a [Spec] whose [Backend] is [Inheritable].
type Heir interface {
	// Inherit is Open with the descriptors of the process whose guest this is. It takes the
	// files over, also if it fails. Until [Locker].Lock the other process uses them, and
	// nothing of what they stand for may be changed, not even by Close.
	Inherit(files []*os.File, log *slog.Logger) (Backend, error)
}

// CloseFiles closes what is not wanted of descriptors that were inherited.
func CloseFiles(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // nothing was written by it
	}
}
