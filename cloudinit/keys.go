package cloudinit

import (
	"bytes"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
)

// maxKeys is how many keys a file may have.
const maxKeys = 64

// ParseKeys returns the public keys of SSH in a file, a line each, as ssh-keygen writes a
// file that ends in .pub; lines that are empty or begin with # are left out. A private key is
// refused: it is not repeated in the error.
func ParseKeys(b []byte) ([]string, error) {
	if err := checkSize("SSH keys", b); err != nil {
		return nil, err
	}
	if bytes.Contains(b, []byte("PRIVATE KEY")) || bytes.HasPrefix(b, []byte("PuTTY-User-Key-File")) {
		return nil, errors.New("it has a private key, which nobody else should see: give the public one, in the file whose name ends in .pub")
	}
	var keys []string
	for i, line := range strings.Split(string(b), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if err := checkKey(line); err != nil {
			return nil, fmt.Errorf("line %d: %w", i+1, err)
		}
		if keys = append(keys, line); len(keys) > maxKeys {
			return nil, fmt.Errorf("more than %d keys", maxKeys)
		}
	}
	if keys == nil {
		return nil, errors.New("it has no key")
	}
	return keys, nil
}

// checkKey reports why a line is no public key: [options] type base64 [comment]. The
// decoded key begins with its type as well (RFC 4253, 6.6).
func checkKey(line string) error {
	for _, b := range []byte(line) {
		if b < ' ' && b != '\t' || b == 0x7f {
			return errors.New("it has control characters")
		}
	}
	words := strings.Fields(line)
	for i, kind := range words[:len(words)-1] {
		if !strings.HasPrefix(kind, "ssh-") && !strings.HasPrefix(kind, "ecdsa-") && !strings.HasPrefix(kind, "sk-") {
			continue // an option
		}
		key, err := base64.StdEncoding.DecodeString(words[i+1])
		if err != nil || len(key) < 4 {
			continue // options may have such words, in quotes
		}
		n := binary.BigEndian.Uint32(key)
		if uint64(n)+4 > uint64(len(key)) || string(key[4:4+n]) != kind {
			return fmt.Errorf("the key says that it is of another type than %.40q, or is cut", kind)
		}
		return nil
	}
	return fmt.Errorf("expected a public key of SSH, as in ssh-ed25519 AAAA… me@host, found %.40q", line)
}
