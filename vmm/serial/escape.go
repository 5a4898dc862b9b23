package serial

// prefix is the key that says that the next one is for govmm: Ctrl-A.
const prefix = 0x01

const helpText = "\r\n" +
	"govmm: Ctrl-A x        quit: end this VM\r\n" +
	"       Ctrl-A h        this help\r\n" +
	"       Ctrl-A Ctrl-A   send Ctrl-A to the guest\r\n"

// escape takes what is meant for govmm out of a user's input.
type escape struct {
	prefixed bool // the last key was the prefix
}

// filter moves what is meant for the guest to the front of p and returns how
// much that is. It calls command for each key after a prefix.
func (e *escape) filter(p []byte, command func(key byte)) int {
	n := 0
	for _, key := range p {
		switch {
		case !e.prefixed && key == prefix:
			e.prefixed = true
			continue
		case e.prefixed && key != prefix:
			e.prefixed = false
			command(key)
			continue
		}
		e.prefixed = false
		p[n] = key
		n++
	}
	return n
}
